"""A device whose memory is the host's: forms of fixed width on the CPU, and tests of the executor."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from typing_extensions import override

from diagd.engines.devices import Array, Device
from diagd.engines.devices.kernels import (
    ADVANCE,
    APPEND,
    CHUNK_BYTES,
    HEADER_WORDS,
    SAMPLE,
    AdvanceArguments,
    AppendArguments,
    SampleArguments,
)
from diagd.engines.engine import HostClock, SamplingState
from diagd.engines.sampler import sample

_ALIGNMENT = 256


class HostDevice(HostClock, Device):
    """Runs what is queued at once; a captured graph is the list of its operations.

    Args:
        kernels: a host build of ``native/``; without, NumPy does what the kernels do.
    """

    kind, stream, ahead, threads = "cpu", 0, False, 1

    def __init__(self, kernels: ctypes.CDLL | None = None) -> None:
        super().__init__()
        self._kernels = kernels
        self.chunk_bytes = 1 if kernels is None else CHUNK_BYTES
        self._memory: dict[int, Array] = {}
        self._graphs: list[list[Callable[[], object]]] = []
        self._capturing: list[Callable[[], object]] | None = None

    @override
    def allocate(self, size: int) -> int:
        memory = np.zeros(size + _ALIGNMENT, np.uint8)
        address = memory.ctypes.data + -memory.ctypes.data % _ALIGNMENT
        self._memory[address] = memory[address - memory.ctypes.data :]
        return address

    @override
    def host_array(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        return np.zeros(math.prod(shape), dtype).reshape(shape)

    @override
    def upload(self, address: int, array: Array) -> None:
        size = array.nbytes
        self.run(partial(ctypes.memmove, address, array.ctypes.data, size), "upload", address, size)

    @override
    def download(self, array: Array, address: int) -> None:
        size = array.nbytes
        self.run(partial(ctypes.memmove, array.ctypes.data, address, size), "download", address, size)

    @override
    def copy(self, target: int, source: int, size: int) -> None:
        self.run(partial(ctypes.memmove, target, source, size), "copy", target, source, size)

    @override
    def clear(self, address: int, size: int) -> None:
        self.run(partial(ctypes.memset, address, 0, size), "clear", address, size)

    @override
    def launch(self, kernel: str, arguments: ctypes.Structure, blocks: int, threads: int) -> None:
        if self._kernels is not None:
            function = getattr(self._kernels, kernel)
            work: Callable[[], object] = partial(function, ctypes.byref(arguments), threads)
        else:
            twins: dict[str, Callable[[Any], Callable[[], object]]] = {
                ADVANCE: self._advance,
                SAMPLE: self._sample,
                APPEND: self._append,
            }
            work = twins[kernel](arguments)
        self.run(work, kernel, arguments.width)

    @override
    def capture(self, work: Callable[[], None]) -> int:
        self._capturing = []
        work()
        self._graphs.append(self._capturing)
        self._capturing = None
        return len(self._graphs) - 1

    @override
    def replay(self, graph: int) -> None:
        for operation in self._graphs[graph]:
            operation()

    def run(self, operation: Callable[[], object], *entry: object) -> None:
        """Run an operation, or keep it while a graph is captured; ``entry`` says what it is."""
        if self._capturing is not None:
            self._capturing.append(operation)
        else:
            operation()

    @override
    def memory_used(self) -> int:
        return sum(memory.nbytes for memory in self._memory.values())

    @override
    def close(self) -> None:
        self._memory.clear()
        self._graphs.clear()

    def _bytes(self, address: int) -> Array:
        """Memory from an address on that was allocated, or lies in what was."""
        if (memory := self._memory.get(address)) is not None:
            return memory
        start = max(begin for begin in self._memory if begin < address)
        return self._memory[start][address - start :]

    def _words(self, address: int) -> Array:
        memory = self._bytes(address)
        return memory[: len(memory) // 4 * 4].view(np.int32)

    def _advance(self, a: AdvanceArguments) -> Callable[[], object]:
        """``diagd_advance`` in NumPy; the arrays are looked up once."""
        records, cursor = self._words(a.records), self._words(a.cursor)
        sources, positions = self._words(a.sources), self._words(a.positions)
        slots, index, used = (self._words(at) for at in (a.slot_position, a.write_index, a.live))
        width = a.width

        def work() -> None:
            at = int(cursor[0])
            header = records[at : at + HEADER_WORDS].tolist()
            rows, write_index, live, updates = header[:4]
            for target, start in zip((sources, positions), header[11:13], strict=True):
                target[:rows] = records[start : start + rows]
                target[rows:width] = 0
            if 0 < rows < width:  # pads stand where the last row stands, so that every query sees a key
                positions[rows:width] = positions[rows - 1]
            changed, values = header[16:18]
            slots[records[changed : changed + updates]] = records[values : values + updates]
            index[:2], used[0] = (write_index, 0), live
            cursor[:2] = header[10], at

        return work

    def _sample(self, a: SampleArguments) -> Callable[[], object]:
        """``diagd_sample`` in NumPy; a row that is refused raises at once."""
        records, cursor, tokens = (self._words(at) for at in (a.records, a.cursor, a.token_buffer))
        ranges = self._words(a.ranges)[: 2 * a.frame_length].reshape(-1, 2)
        logits = self._words(a.logits)[: a.width * a.vocabulary].view(np.float32).reshape(a.width, -1)
        prefix, keep_crossing = a.prefix, bool(a.keep_crossing)

        def work() -> None:
            header = records[int(cursor[1]) :][:HEADER_WORDS]
            count, columns = int(header[4]), header[13:16].tolist()
            decoded, sinks = (records[start : start + count] for start in columns[:2])
            cells = records[columns[2] : columns[2] + 2 * count].copy().view(np.int64)
            temperature, top_p = header[5:8:2].view(np.float32).tolist()
            seed = int(header[8:10].copy().view(np.uint64)[0])
            state = SamplingState(temperature, int(header[6]), top_p, seed)
            low, high = ranges[(cells - prefix) % len(ranges)].T
            tokens[sinks] = sample(
                logits[decoded], cells, state, low=low, high=high, keep_crossing=keep_crossing
            )

        return work

    def _append(self, a: AppendArguments) -> Callable[[], object]:
        """``diagd_append`` in NumPy."""
        count, chunk = a.tensors, self.chunk_bytes * a.row_chunks
        pointers = [
            np.array(self._words(address)[: 2 * count]).view(np.uint64) for address in (a.rows, a.buffers)
        ]
        rows = [self._bytes(int(at))[: a.groups * a.width * chunk] for at in pointers[0]]
        buffers = [self._bytes(int(at))[: a.groups * a.capacity * chunk] for at in pointers[1]]
        pairs = [
            (row.reshape(a.groups, a.width, chunk), buffer.reshape(a.groups, a.capacity, chunk))
            for row, buffer in zip(rows, buffers, strict=True)
        ]
        index, width = self._words(a.write_index), a.width

        def work() -> None:
            start = int(index[0])
            for new, buffer in pairs:
                buffer[:, start : start + width] = new

        return work
