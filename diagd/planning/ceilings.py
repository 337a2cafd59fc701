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
    from onnx import helper

    shapes: dict[str, tuple[int | str, int]] = {
        "A": (rows, inner),
        "B": (inner, columns),
        "C": (rows, columns),
    }
    a, b, c = (helper.make_tensor_value_info(name, element, shape) for name, shape in shapes.items())
    graph = helper.make_graph([helper.make_node("MatMul", ["A", "B"], ["C"])], "product", [a, b], [c])
    opsets = [helper.make_opsetid("", 13)]
    return bytes(helper.make_model(graph, ir_version=8, opset_imports=opsets).SerializeToString())


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
