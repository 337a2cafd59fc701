"""Step records: all that a device must know of the steps to come, in one copy a block; and who sends them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final

import numpy as np

from diagd.bundle import Manifest
from diagd.engines.devices import Array, Device, kernels
from diagd.engines.engine import VOID, Int, SamplingState, Steps
from diagd.engines.tensors import StepTensors

HALF_WORDS: Final = 1 << 17
"""Words of one of the two buffers: 512 KB, a frame of next-token prediction of the largest grid and more."""

CURSOR_BYTES = 8  # where the next step's header begins, and that of the step that runs

APPEND_BLOCKS = 64


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
    words = len(steps) * kernels.HEADER_WORDS + 2 * len(steps.sources) + 4 * len(steps.sinks)
    words += 2 * len(steps.update_slots)
    if words <= HALF_WORDS:
        return len(steps)
    ends = np.arange(1, len(steps) - first + 1, dtype=np.int64) * kernels.HEADER_WORDS
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
    starts = np.cumsum([count * kernels.HEADER_WORDS, *map(len, columns)])
    np.concatenate(columns, out=half[starts[0] : starts[-1]])
    headers = half[: starts[0]].reshape(count, kernels.HEADER_WORDS)
    for word, part in ((0, offsets), (3, changes), (4, draws)):
        np.subtract(part[1:], part[:-1], out=headers[:, word])
    headers[:, 1], headers[:, 2] = steps.write_index[first:last], steps.live[first:last]
    headers[:, 5:10] = _sampling_words(steps.sampling)
    headers[:, 10] = np.arange(base + kernels.HEADER_WORDS, base + starts[0] + 1, kernels.HEADER_WORDS)
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


class Lane:
    """The steps that a stream was sent, where they are queued, and the kernels of its part of a pass.

    Attributes:
        next, queued, sent: steps that were asked for, that are queued, and whose records are up.
        padded: widths that they are run at.
        parts: ends of those that may be queued together.
        idle_at: width of the last pass, where the stream took no part in it. Its rows then went to the slots
            behind those that its session knows of.
    """

    def __init__(
        self, device: Device, tensors: StepTensors, number: int, idle: Int, rules: Mapping[str, int]
    ) -> None:
        self.records, self.cursor = RecordRing(device), device.allocate(CURSOR_BYTES)
        self._device, self._tensors, self._number = device, tensors, number
        self._idle, self._rules = idle, rules  # as many zeros as rows, VOID, the first slot behind, and 0
        self.next = self.queued = self.sent = 0
        self.steps: Steps
        self.padded: tuple[int, ...] = ()
        self.parts: Iterator[int] = iter(())
        self.idle_at: int | None = None
        self._pointers: dict[int, tuple[int, int]] = {}

    def take(self, steps: Steps, padded: Int, parts: Sequence[int] | None) -> None:
        """The steps to run next."""
        self.steps, self.next, self.queued, self.sent = steps, 0, 0, 0
        self.padded = tuple(padded.tolist())
        self.parts = iter(range(1, len(steps) + 1) if parts is None else parts)

    def forget(self) -> None:
        """No record that was sent is to run; the device waits for none."""
        self.records.restart()
        self._device.clear(self.cursor, CURSOR_BYTES)

    def part(self, name: str, width: int = 1) -> int:
        """Where the stream's part of a tensor is, in a step of ``width`` rows."""
        return self._tensors.named[name].part(self._number, self._tensors.streams, width)

    def wake(self) -> None:
        """Hide again what the stream saw while it was idle."""
        if self.idle_at is not None:
            self._device.upload(self._behind, self._idle[-3:-2])
        self.idle_at = None

    def rest(self, width: int) -> None:
        """Take no part in a pass: rows stand at position 0, and the first of them is visible there.

        No row is to see nothing, of which some attention makes what is no number.
        """
        if self.idle_at == width:
            return
        for name in ("sources", "positions"):
            self._device.upload(self.part(name, width), self._idle[:width])
        self._device.upload(self.part("write_index"), self._idle[-2:])
        self._device.upload(self._behind, self._idle[:1])
        self.idle_at = width

    @property
    def _behind(self) -> int:
        """Where the position of the first slot is that the session does not know of."""
        return self.part("slot_position") + 4 * int(self._idle[-2])

    def advance(self, width: int) -> None:
        """Queue the spreading of a record over the tensors that the program reads."""
        named = (name for name in kernels.ADVANCE_POINTERS if name in self._tensors.named)
        addresses = {name: self.part(name, width) for name in named}
        arguments = kernels.AdvanceArguments(
            records=self.records.address, cursor=self.cursor, **addresses, width=width
        )
        self._device.launch(kernels.ADVANCE, arguments, 1, self._device.threads)

    def sample(self, width: int) -> None:
        """Queue the making of tokens of logits."""
        tensors = self._tensors
        arguments = kernels.SampleArguments(
            records=self.records.address,
            cursor=self.cursor,
            logits=self.part("logits", width),
            token_buffer=self.part("token_buffer"),
            refused=tensors.token_buffer.address + 4 * tensors.refusal_place,
            **self._rules,
            width=width,
        )
        self._device.launch(kernels.SAMPLE, arguments, width, self._device.threads)

    def append(self, width: int) -> None:
        """Queue the copy of new K/V rows into the buffers."""
        tensors = self._tensors
        if width not in self._pointers:
            groups = (tensors.rows, tensors.cache.values())
            rows, buffers = (tensors.pointers(group, self._number, width) for group in groups)
            self._pointers[width] = rows, buffers
        rows, buffers = self._pointers[width]
        buffer = next(iter(tensors.cache.values()))
        arguments = kernels.AppendArguments(
            rows=rows,
            buffers=buffers,
            write_index=self.part("write_index"),
            tensors=len(tensors.cache),
            groups=buffer.shape[1],
            capacity=buffer.shape[2],
            width=width,
            row_chunks=buffer.shape[3] * buffer.dtype.itemsize // self._device.chunk_bytes,
        )
        self._device.launch(kernels.APPEND, arguments, APPEND_BLOCKS, self._device.threads)


def open_lanes(
    device: Device, tensors: StepTensors, manifest: Manifest, capacity: int, max_width: int
) -> list[Lane]:
    """A lane for each stream; slots from ``capacity`` on are those that its session does not know of."""
    table: Int = device.host_array((manifest.layout.frame_length, 2), np.int32)
    table[:] = manifest.sampling.range_table(manifest.layout)
    ranges = device.allocate(table.nbytes)
    device.upload(ranges, table)
    rules = {
        "ranges": ranges,
        "prefix": manifest.layout.prefix,
        "frame_length": manifest.layout.frame_length,
        "vocabulary": manifest.output_vocabulary,
        "keep_crossing": manifest.sampling.keep_crossing,
    }
    idle: Int = device.host_array((max_width + 3,), np.int32)
    idle[max_width:] = VOID, capacity, 0
    return [Lane(device, tensors, number, idle, rules) for number in range(tensors.streams)]
