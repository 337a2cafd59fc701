"""The limits of a device, measured on its stream: copies of its memory, and a product of float16 matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from diagd.engines.cuda.device import Device
from diagd.engines.cuda.onnxruntime import OnnxRuntimeProgram, open_cuda_session
from diagd.engines.cuda.program import Program, Tensor
from diagd.engines.tensorrt.builder import Builder, BuildOptions
from diagd.engines.tensorrt.capabilities import import_tensorrt
from diagd.engines.tensorrt.program import TensorRTProgram
from diagd.planning.ceilings import Ceilings, matrix_product_model

COPY_BYTES: Final = 256 << 20
"""Of each copy: beyond the caches of any GPU."""

SIDE: Final = 8192
FLOAT16: Final = 10

_REPEATS: Final = 5
_CALLS: Final = 4
"""Queued between two time stamps, so that starting the first one does not count."""

MakeProduct = Callable[[Path, int, Mapping[str, Tensor]], Program]
"""Binds the model in a file, its rows and its tensors A, B and C."""


def measure_device_ceilings(
    device: Device, make_product: MakeProduct, side: int = SIDE, size: int = COPY_BYTES
) -> Ceilings:
    """Measure the limits of a device that has nothing else to do; the best of a few repeats.

    Args:
        device: memory is allocated on it until it is closed.
        make_product: the backend whose product counts; see ``product_maker``.
        side: of the square matrices.
        size: bytes of a copy.

    Raises:
        EngineError: the backend refuses the product.
    """
    source, target = device.allocate(size), device.allocate(size)
    copy = _best(device, lambda: device.copy(target, source, size))
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
        product = _best(device, lambda: program.enqueue(side))
    return Ceilings(2.0 * size / copy, 0.0, 2.0 * side**3 / product, threads=0)


def product_maker(backend: str, device: Device) -> MakeProduct:
    """The product by a backend's own library: ``cuda`` (ONNX Runtime), ``tensorrt`` or ``tensorrt_rtx``."""

    def by_onnxruntime(model: Path, rows: int, tensors: Mapping[str, Tensor]) -> Program:
        session = open_cuda_session(model, device, graphs=False)
        return OnnxRuntimeProgram(session, tensors, (rows,), device.kind)

    def by_tensorrt(model: Path, rows: int, tensors: Mapping[str, Tensor]) -> Program:
        trt = import_tensorrt(None if backend == "tensorrt" else backend)
        plan = model.with_suffix(".plan")
        plan.write_bytes(Builder(trt).build(model, BuildOptions((rows,), tokens=0)).plan)
        return TensorRTProgram(trt, plan, (rows,), tensors, device.stream)

    return by_onnxruntime if backend == "cuda" else by_tensorrt


def _fill(device: Device, addresses: Iterable[int], side: int) -> None:
    """Random numbers: on zeros a GPU draws less power and clocks higher than on any real matrix."""
    values = device.host_array((side, side), np.float16)
    values[:] = np.random.default_rng(0).standard_normal((side, side), np.float32)
    for address in addresses:
        device.upload(address, values)
    device.synchronise()


def _best(device: Device, work: Callable[[], None]) -> float:
    """Seconds of one call, by time stamps around a few of them; the first ones do not count."""
    best = math.inf
    for repeat in range(_REPEATS + 1):
        device.mark(0)
        for _ in range(_CALLS):
            work()
        device.mark(1)
        device.synchronise()
        if repeat:
            best = min(best, device.seconds(0, 1) / _CALLS)
    return best
