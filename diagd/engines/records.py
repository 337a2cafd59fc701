"""Step records: all that a device must know of the steps to come, in one copy a block."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np

from diagd.engines.devices import Array, Device
from diagd.engines.devices.kernels import HEADER_WORDS
from diagd.engines.engine import VOID, Int, SamplingState, Steps

HALF_WORDS: Final = 1 << 17
"""Words of one of the two buffers: 512 KB, a frame of next-token prediction of the largest grid and more."""


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
    words = len(steps) * HEADER_WORDS + 2 * len(steps.sources) + 4 * len(steps.sinks)
    words += 2 * len(steps.update_slots)
    if words <= HALF_WORDS:
        return len(steps)
    ends = np.arange(1, len(steps) - first + 1, dtype=np.int64) * HEADER_WORDS
    ends += 2 * (steps.offsets[first + 1 :] - steps.offsets[first])
    ends += 4 * (steps.decode_offsets[first + 1 :] - steps.decode_offsets[first])
    ends += 2 * (steps.update_offsets[first + 1 :] - steps.update_offsets[first])
    return first + max(1, int(np.searchsorted(ends, HALF_WORDS, side="right")))


def _pack(half: Array, base: int, steps: Steps, first: int, last: int) -> int:
    """Write the records of steps [first, last) into a buffer of words from ``base`` on; returns its end.

    Headers come first, then the columns of rows, of rows that decode and of slot updates, each of all steps.
    """
    count = last - first
    offsets, draws, changes = (
        bounds[first : last + 1] for bounds in (steps.offsets, steps.decode_offsets, steps.update_offsets)
    )
    rows, drawn, updates = (slice(int(part[0]), int(part[-1])) for part in (offsets, draws, changes))
    columns = (
        *(steps.sources[rows], steps.positions[rows], steps.decoded[drawn], steps.sinks[drawn]),
        *(steps.cells[drawn].view(np.int32), steps.update_slots[updates], steps.update_positions[updates]),
    )
    starts = np.cumsum([count * HEADER_WORDS, *map(len, columns)])
    np.concatenate(columns, out=half[starts[0] : starts[-1]])
    headers = half[: starts[0]].reshape(count, HEADER_WORDS)
    for word, part in ((0, offsets), (3, changes), (4, draws)):
        np.subtract(part[1:], part[:-1], out=headers[:, word])
    headers[:, 1], headers[:, 2] = steps.write_index[first:last], steps.live[first:last]
    headers[:, 5:10] = _sampling_words(steps.sampling)
    headers[:, 10] = np.arange(base + HEADER_WORDS, base + starts[0] + 1, HEADER_WORDS)
    headers[-1, 10] = HALF_WORDS - base  # the other buffer
    at = base + starts
    headers[:, 11:13] = offsets[:-1, None] + (at[0:2] - rows.start)
    headers[:, 13:15] = draws[:-1, None] + (at[2:4] - drawn.start)
    headers[:, 15] = 2 * draws[:-1] + (at[4] - 2 * drawn.start)  # a cell is two words
    headers[:, 16:18] = changes[:-1, None] + (at[5:7] - updates.start)
    return int(starts[-1])


@lru_cache(maxsize=64)
def _sampling_words(sampling: SamplingState) -> Int:
    """Temperature, top-k, top-p and seed as a header has them."""
    numbers = np.array([sampling.temperature, sampling.top_p], np.float32).view(np.int32)
    seed = np.array([sampling.seed], np.uint64).view(np.int32)
    return np.array([numbers[0], min(sampling.top_k, VOID), numbers[1], *seed], np.int32)
