"""The limits of this machine's processor, measured where they are needed: copies and a matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from diagd.engines.host import cores, memory_bytes
from diagd.errors import require
from diagd.planning.devices import THIS, Device

COPY_BYTES: Final = 64 << 20
"""Of each thread's copy: beyond the caches of a desktop."""

_REPEATS: Final = 5
_SIDE: Final = 1024


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second that memory moves, and operations a second of a matrix product.

    ``copied`` counts what a copy reads and writes, ``read`` what a sum reads (0 on a device, where copies
    alone are measured); ``bandwidth`` is the better. Products are float32 on ``threads`` of a processor,
    float16 on a device, which has no threads.
    """

    copied: float
    read: float
    peak: float
    threads: int

    @property
    def bandwidth(self) -> float:
        """The limit of a step, which mostly reads."""
        return max(self.copied, self.read)


def measure_ceilings(threads: int = 0) -> Ceilings:
    """Measure the limits with the threads an engine would use; the best of a few repeats, about a second.

    Args:
        threads: 0 is one for each core this process may use.
    """
    threads = threads or cores()
    return Ceilings(*memory_bandwidth(threads), matrix_peak(threads), threads)


def memory_bandwidth(threads: int, size: int = COPY_BYTES) -> tuple[float, float]:
    """Bytes a second of copies (read and written) and of sums, of ``size`` bytes on every thread at once."""
    pairs = [(np.ones(size // 4, np.float32), np.zeros(size // 4, np.float32)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        copies = _best(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs)))
        sums = _best(lambda: list(pool.map(lambda pair: np.dot(pair[0], pair[0]), pairs)))
    return 2.0 * size * threads / copies, size * threads / sums


def matrix_peak(threads: int, side: int = _SIDE) -> float:
    """Single-precision operations a second of ONNX Runtime's product of two square matrices."""
    runtime = require("onnxruntime", extra="export", purpose="measure the matrix product")
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(
        matrix_product_model(side, side, side), settings, providers=["CPUExecutionProvider"]
    )
    factors = {name: np.ones((side, side), np.float32) for name in ("A", "B")}
    session.run(None, factors)
    return 2.0 * side**3 / _best(lambda: session.run(None, factors))


def matrix_product_model(rows: int | str, inner: int, columns: int, element: int = 1) -> bytes:
    """An ONNX model C[rows, columns] = A[rows, inner] @ B[inner, columns].

    Args:
        rows: a number, or the name of an axis whose length is given later.
        inner: length of the products.
        columns: of the second factor.
        element: type of all three, a ``TensorProto.DataType``.
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


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few repeats."""
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def this_device(threads: int = 0) -> Device:
    """The processor of this machine as a device, measured."""
    ceilings = measure_ceilings(threads)
    return Device(
        THIS,
        f"this machine's CPU, {ceilings.threads} threads",
        float(memory_bytes()),
        ceilings.bandwidth,
        ceilings.peak,
        1e9,
        "measured now: copy and sum, and product of single-precision matrices",
    )
