"""What the executor runs on: memory at fixed addresses, kernels and graphs that nobody waits for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Clock

Array = NDArray[Any]


class Device(Clock, Protocol):
    """Memory, kernels, graphs and time stamps of one accelerator.

    ``stream`` is the handle that backends take; ``kind`` is ONNX Runtime's name for the memory; ``ahead``:
    what is queued may still run when a call returns; ``chunk_bytes``: what ``append`` moves at a time;
    ``threads``: of a block of a kernel.
    """

    stream: int
    kind: str
    ahead: bool
    chunk_bytes: int
    threads: int

    def allocate(self, size: int) -> int:
        """Address of ``size`` zeroed bytes that live as long as the device."""

    def host_array(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """A zeroed array that copies read and write without the host waiting."""

    def upload(self, address: int, array: Array) -> None:
        """Queue a copy to the device; the array may not change until the copy is done."""

    def download(self, array: Array, address: int) -> None:
        """Queue a copy from the device."""

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue a copy within the device."""

    def clear(self, address: int, size: int) -> None:
        """Queue zeroing."""

    def launch(self, kernel: str, arguments: ctypes.Structure, blocks: int, threads: int) -> None:
        """Queue a kernel of ``native/``; the arguments are copied."""

    def capture(self, work: Callable[[], None]) -> int:
        """Record what ``work`` queues instead of running it; returns the graph's handle."""

    def replay(self, graph: int) -> None:
        """Queue a captured graph."""

    def synchronise(self) -> None:
        """Wait for everything queued."""
        return

    def memory_used(self) -> int:
        """Bytes of the device that are in use, those of other programs included."""

    def close(self) -> None:
        """Wait, then free everything; arrays and addresses handed out are dead afterwards."""


class KernelDevice(Device, Protocol):
    """A GPU, or what stands in for one: kernels are loaded on it.

    ``architecture``: compute capability, such as 90; ``processors``: streaming multiprocessors;
    ``block_bytes``: memory that a block may ask for.
    """

    architecture: int
    processors: int
    block_bytes: int

    def load(self, code: bytes, names: Sequence[str], shared: int = 0) -> Mapping[str, Any]:
        """Functions of machine code or PTX by name, which may take ``shared`` bytes of a block's memory."""
