"""Step records: all that a device must know of the steps to come, in one copy a block."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagd.engines.devices.device import Array, Device
from diagd.engines.devices.kernels import HEADER_WORDS
from diagd.engines.engine import Int, Steps

HALF_WORDS: Final = 1 << 17
"""Words of one of the two buffers: 512 KB, a frame of next-token prediction of the largest grid and more."""

_COLUMNS: Final = np.arange(4, dtype=np.int32)


class RecordRing:
    """Two buffers of words on the host, the same on the device; ``native/step_kernels.h`` has their layout.

    The host fills one while the device reads the other, and waits only where it would overtake the device by
    both. Headers are linked: each says where the next one is, the last of a buffer that of the other buffer.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._host: Array = device.host_array((2, HALF_WORDS), np.int32)
        self.address = device.allocate(self._host.nbytes)
        self._half = self._queued = 0

    def drained(self) -> None:
        """The device has run every step sent so far."""
        self._queued = 0

    @property
    def is_full(self) -> bool:
        """Whether the device may still read the buffer that the next steps go to."""
        return self._queued == len(self._host)

    def send(self, steps: Steps, first: int) -> int:
        """Queue the copy of as many steps as fit, from step ``first`` on; returns one past the last."""
        last = _fitting(steps, first)
        half = self._host[self._half]
        used = _pack(half, self._half * HALF_WORDS, steps, first, last)
        self._device.upload(self.address + self._half * half.nbytes, half[:used])
        self._half = 1 - self._half
        self._queued += 1
        return last

    def restart(self) -> None:
        """Begin at the first buffer again, as a cursor of 0 does."""
        self._half = self._queued = 0


def _fitting(steps: Steps, first: int) -> int:
    """One past the last step that fits one buffer with those from ``first`` on."""
    words = len(steps) * HEADER_WORDS + 4 * len(steps.sources) + 2 * len(steps.update_slots)
    if words <= HALF_WORDS:
        return len(steps)
    ends = np.arange(1, len(steps) - first + 1, dtype=np.int64) * HEADER_WORDS
    ends += 4 * (steps.offsets[first + 1 :] - steps.offsets[first])
    ends += 2 * (steps.update_offsets[first + 1 :] - steps.update_offsets[first])
    return first + max(1, int(np.searchsorted(ends, HALF_WORDS, side="right")))


def _pack(half: Array, base: int, steps: Steps, first: int, last: int) -> int:
    """Write the records of steps [first, last) into a buffer of words from ``base`` on; returns its end.

    Headers come first, then the columns of the rows and of the slot updates, each over all the steps.
    """
    count, offsets = last - first, steps.offsets[first : last + 1]
    changes = steps.update_offsets[first : last + 1]
    begin, end, change, changed = map(int, (offsets[0], offsets[-1], changes[0], changes[-1]))
    rows, updates, body = slice(begin, end), slice(change, changed), count * HEADER_WORDS
    width, depth = end - begin, changed - change
    behind = body + 4 * width
    columns = (
        *(steps.sources[rows], steps.positions[rows], steps.sinks[rows], _draws(steps, first, last)),
        *(steps.update_slots[updates], steps.update_positions[updates]),
    )
    np.concatenate(columns, out=half[body : behind + 2 * depth])
    headers = half[:body].reshape(count, HEADER_WORDS)
    np.subtract(offsets[1:], offsets[:-1], out=headers[:, 0])
    headers[:, 1], headers[:, 2] = steps.write_index[first:last], steps.live[first:last]
    np.subtract(changes[1:], changes[:-1], out=headers[:, 3])
    sampling = steps.sampling
    headers[:, 4:7] = _bits(sampling.temperature), sampling.top_k, _bits(sampling.top_p)
    headers[:, 7] = np.arange(base + HEADER_WORDS, base + body + 1, HEADER_WORDS)
    headers[-1, 7] = HALF_WORDS - base  # the other buffer
    headers[:, 8:12] = offsets[:-1, None] + (width * _COLUMNS + (base + body - begin))
    headers[:, 12:14] = changes[:-1, None] + (depth * _COLUMNS[:2] + (base + behind - change))
    return behind + 2 * depth


def _draws(steps: Steps, first: int, last: int) -> Int:
    """Bits of the random number of each row; a half where a row decodes nothing."""
    drawn = slice(int(steps.decode_offsets[first]), int(steps.decode_offsets[last]))
    starts, bounds = steps.offsets[first : last + 1], steps.decode_offsets[first : last + 1]
    decoding = np.repeat(starts[:-1] - starts[0], bounds[1:] - bounds[:-1]) + steps.decoded[drawn]
    rows: NDArray[np.float32] = np.full(int(starts[-1] - starts[0]), 0.5, np.float32)
    rows[decoding] = steps.uniforms[drawn]
    return rows.view(np.int32)


@lru_cache(maxsize=64)
def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))
