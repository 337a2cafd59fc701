"""What a machine can do at best, measured where it is needed: copies of its memory and a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from diagd.engines.devices import Device
from diagd.engines.engine import Clock, HostClock
from diagd.engines.tensors import Program, Tensor
from diagd.errors import require

COPY_BYTES: Final = 64 << 20
"""Of each thread's copy: beyond the caches of a desktop."""

DEVICE_COPY_BYTES: Final = 256 << 20
"""Of each copy: beyond the caches of any GPU."""

FLOAT, FLOAT16 = 1, 10
"""Element types of ONNX (TensorProto.DataType)."""

SIDE: Final = 1024
DEVICE_SIDE: Final = 8192

_REPEATS: Final = 5
_QUEUED: Final = 4
"""Calls between two time stamps of a device, so that starting the first one does not count."""

MakeProduct = Callable[[Path, int, Mapping[str, Tensor]], Program]
"""Binds the model in a file, its rows and its tensors A, B and C."""


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second that memory moves, and operations a second of a matrix product.

    ``copied`` counts what a copy reads and writes, ``read`` what a sum reads (0 on a device, where copies
    alone are measured); ``bandwidth`` is the better. Products are float32 on ``threads`` of a processor (or
    bfloat16, where its step graphs are), float16 on a device, which has no threads.
    """

    copied: float
    read: float
    peak: float
    threads: int

    @property
    def bandwidth(self) -> float:
        """The limit of a step, which mostly reads."""
        return max(self.copied, self.read)


def memory_bandwidth(threads: int, size: int = COPY_BYTES) -> tuple[float, float]:
    """Bytes a second of copies (read and written) and of sums, of ``size`` bytes on every thread at once."""
    pairs = [(np.ones(size // 4, np.float32), np.zeros(size // 4, np.float32)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        copies = _quickest(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs)))
        sums = _quickest(lambda: list(pool.map(lambda pair: np.dot(pair[0], pair[0]), pairs)))
    return 2.0 * size * threads / copies, size * threads / sums


def matrix_peak(threads: int, side: int = SIDE) -> float:
    """Single-precision operations a second of ONNX Runtime's product of two square matrices."""
    runtime = require("onnxruntime", extra="export", purpose="measure the matrix product")
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(
        matrix_product_model(side, side, side), settings, providers=["CPUExecutionProvider"]
    )
    factors = {name: np.ones((side, side), np.float32) for name in ("A", "B")}
    return product_peak(lambda: session.run(None, factors), side)


def product_peak(product: Callable[[], object], side: int = SIDE) -> float:
    """Operations a second of a product of two square matrices."""
    return 2.0 * side**3 / _quickest(product)


def matrix_product_model(rows: int | str, inner: int, columns: int, element: int = FLOAT) -> bytes:
    """An ONNX model C[rows, columns] = A[rows, inner] @ B[inner, columns].

    ``rows``: a number, or the name of an axis whose length is given later. ``element``: type of all three, a
    ``TensorProto.DataType``.
    """
    shapes = {"A": (rows, inner), "B": (inner, columns), "C": (rows, columns)}
    values = {name: _tensor(name, element, shape) for name, shape in shapes.items()}
    node = _message((1, "A"), (1, "B"), (2, "C"), (4, "MatMul"))
    graph = _message((1, node), (2, "product"), (11, values["A"]), (11, values["B"]), (12, values["C"]))
    return _message((1, 8), (7, graph), (8, _message((2, 13))))


def _tensor(name: str, element: int, shape: tuple[int | str, ...]) -> bytes:
    """A ValueInfoProto; an axis is a number (field 1) or a name (field 2)."""
    axes = [(1, _message((2 if isinstance(size, str) else 1, size))) for size in shape]
    return _message((1, name), (2, _message((1, _message((1, element), (2, _message(*axes)))))))


def _message(*fields: tuple[int, int | str | bytes]) -> bytes:
    """A protobuf message, written here because a machine that only runs bundles has no onnx package."""
    data = b""
    for number, value in fields:
        if isinstance(value, int):
            data += _varint(number << 3) + _varint(value)
        else:
            content = value.encode() if isinstance(value, str) else value
            data += _varint(number << 3 | 2) + _varint(len(content)) + content
    return data


def _varint(value: int) -> bytes:
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes(group | 0x80 for group in groups[:-1]) + bytes(groups[-1:])


def device_ceilings(
    device: Device, make_product: MakeProduct, side: int = DEVICE_SIDE, size: int = DEVICE_COPY_BYTES
) -> Ceilings:
    """The limits of a device that has nothing else to do, on its stream; the best of a few repeats.

    Memory is allocated on it until it is closed. The product is that of ``make_product``'s library.

    Raises:
        EngineError: the backend refuses the product.
    """
    source, target = device.allocate(size), device.allocate(size)
    copy = _quickest(lambda: device.copy(target, source, size), device, _QUEUED)
    half = np.dtype(np.float16)
    tensors = {
        name: Tensor(device.allocate(side * side * half.itemsize), (rows, side), half)
        for name, rows in (("A", -1), ("B", side), ("C", -1))
    }
    _fill(device, (tensors["A"].address, tensors["B"].address), side)
    with TemporaryDirectory() as folder:
        model = Path(folder) / "product.onnx"
        model.write_bytes(matrix_product_model("rows", side, side, FLOAT16))
        program = make_product(model, side, tensors)
        product = _quickest(lambda: program.enqueue(side), device, _QUEUED)
    return Ceilings(2.0 * size / copy, 0.0, 2.0 * side**3 / product, threads=0)


def _fill(device: Device, addresses: Iterable[int], side: int) -> None:
    """Random numbers: on zeros a GPU draws less power and clocks higher than on any real matrix."""
    values = device.host_array((side, side), np.float16)
    values[:] = np.random.default_rng(0).standard_normal((side, side), np.float32)
    for address in addresses:
        device.upload(address, values)
    device.synchronise()


def _quickest(work: Callable[[], object], clock: Clock | None = None, calls: int = 1) -> float:
    """Seconds of a call, the best of a few repeats of so many; the first repeat does not count."""
    clock, times = clock or HostClock(), []
    for _ in range(_REPEATS + 1):
        clock.mark(0)
        for _ in range(calls):
            work()
        clock.mark(1)
        times.append(clock.seconds(0, 1) / calls)
    return min(times[1:])
