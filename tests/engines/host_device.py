"""A device whose memory is the host's and whose kernels are the host build; it records what is queued."""

from __future__ import annotations

import ctypes
import math
import subprocess
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from diagd.engines.cuda.device import Array

ROOT = Path(__file__).parents[2]


@lru_cache
def host_kernels(build: str) -> ctypes.CDLL:
    """The host build of the kernels, made by CMake in a directory."""
    for command in (["cmake", "-S", str(ROOT), "-B", build], ["cmake", "--build", build]):
        subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(Path(build) / "libdiagd_step_kernels.so"))


class HostDevice:
    """Runs what is queued at once; ``log`` has the name and numbers of every operation.

    While a graph is captured, operations are kept instead of run, and a replay runs them again.
    """

    kind, stream = "cpu", 0

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._kernels = kernels
        self._memory: list[Array] = []
        self._graphs: list[list[Callable[[], object]]] = []
        self._capturing: list[Callable[[], object]] | None = None
        self._marks: dict[int, float] = {}
        self.log: list[tuple[object, ...]] = []

    def allocate(self, size: int) -> int:
        self._memory.append(np.zeros(size + 256, np.uint8))
        self.log.append(("allocate", size))
        start = self._memory[-1].ctypes.data
        return start + -start % 256

    def host_array(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        return np.zeros(math.prod(shape), dtype).reshape(shape)

    def upload(self, address: int, array: Array) -> None:
        self._queue(
            partial(ctypes.memmove, address, array.ctypes.data, array.nbytes), "upload", address, array.nbytes
        )

    def download(self, array: Array, address: int) -> None:
        self._queue(
            partial(ctypes.memmove, array.ctypes.data, address, array.nbytes),
            "download",
            address,
            array.nbytes,
        )

    def copy(self, target: int, source: int, size: int) -> None:
        self._queue(partial(ctypes.memmove, target, source, size), "copy", target, source, size)

    def clear(self, address: int, size: int) -> None:
        self._queue(partial(ctypes.memset, address, 0, size), "clear", address, size)

    def launch(self, kernel: str, arguments: ctypes.Structure, blocks: int, threads: int) -> None:
        function = getattr(self._kernels, kernel)
        self._queue(partial(function, ctypes.byref(arguments), blocks * threads), kernel, arguments.width)

    def capture(self, work: Callable[[], None]) -> int:
        self._capturing = []
        work()
        self._graphs.append(self._capturing)
        self._capturing = None
        return len(self._graphs) - 1

    def replay(self, graph: int) -> None:
        self.log.append(("replay", graph))
        for operation in self._graphs[graph]:
            operation()

    def synchronise(self) -> None:
        self.log.append(("synchronise",))

    def mark(self, number: int) -> None:
        self._marks[number] = time.perf_counter()

    def seconds(self, first: int, last: int) -> float:
        return self._marks[last] - self._marks[first]

    def memory_used(self) -> int:
        return sum(memory.nbytes for memory in self._memory)

    def close(self) -> None:
        self.log.append(("close",))
        self._memory.clear()

    def run(self, operation: Callable[[], object], *entry: object) -> None:
        """Queue something that is not the device's own, as a backend does on the stream."""
        self._queue(operation, *entry)

    def _queue(self, operation: Callable[[], object], *entry: object) -> None:
        if self._capturing is not None:
            self._capturing.append(operation)
            return
        self.log.append(entry)
        operation()
