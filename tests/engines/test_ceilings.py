"""Limits of the processor and of a device, over memory of the host and, where there is one, on a GPU."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from diagd.engines.backend import find
from diagd.engines.ceilings import (
    FLOAT16,
    device_ceilings,
    matrix_peak,
    matrix_product_model,
    memory_bandwidth,
)
from diagd.engines.onnxruntime_session import OnnxRuntimeProgram
from diagd.engines.tensorrt.builder import Builder, Request
from diagd.engines.tensors import Tensor
from diagd.errors import DiagdError
from tests.engines.host_device import HostDevice, host_kernels

SIDE, SIZE = 64, 1 << 20


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_copies_and_a_product_are_timed_on_the_stream() -> None:
    device, products = HostDevice(host_kernels()), []

    class Watched(OnnxRuntimeProgram):
        def enqueue(self, width: int) -> None:
            super().enqueue(width)
            products.append(width)

    def make(model: Path, rows: int, tensors: Mapping[str, Tensor]) -> Watched:
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        made.update(tensors)
        return Watched(session, tensors, (rows,), "cpu")

    made: dict[str, Tensor] = {}
    ceilings = device_ceilings(device, make, SIDE, SIZE)
    assert ceilings.bandwidth == ceilings.copied > 0
    assert ceilings.peak > 0
    assert Counter(entry[0] for entry in device.log)["copy"] == len(products) == 24
    assert {entry[3] for entry in device.log if entry[0] == "copy"} == {SIZE}
    left, right, product = (np.empty((SIDE, SIDE), np.float16) for _ in range(3))
    for name, array in (("A", left), ("B", right), ("C", product)):
        device.download(array, made[name].address)
    assert left.std() > 0.9
    exact = left.astype(np.float32) @ right.astype(np.float32)
    np.testing.assert_allclose(product, exact, atol=0.05)


def test_tensorrt_takes_the_product(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    model = tmp_path / "product.onnx"
    model.write_bytes(matrix_product_model("rows", SIDE, SIDE, FLOAT16))
    build = Builder(trt).build(model, Request(widths=(SIDE,), targets=("sm89",)))
    assert build.layers == {"MATRIX_MULTIPLY": 1}
    assert len(build.plan) > 0


@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_limits_of_a_gpu(backend: str) -> None:
    """Loose bounds: from the smallest Jetson to beyond any GPU."""
    try:
        ceilings = find(backend).ceilings()
    except DiagdError as error:
        pytest.skip("skipped: no CUDA device" if "no CUDA device" in str(error) else str(error))
    assert 2e10 < ceilings.bandwidth < 2e13
    assert 1e12 < ceilings.peak < 1e16


def test_limits_of_this_processor() -> None:
    """Loose bounds of physics: no memory moves below 0.1 or above 10,000 GB/s."""
    copied, read = memory_bandwidth(1, size=4 << 20)
    assert 1e8 < copied < 1e13
    assert 1e8 < read < 1e13
    assert 1e8 < matrix_peak(1, side=128) < 1e15
    assert find("cpu").ceilings(1).threads == 1


def test_the_model_of_a_product_multiplies() -> None:
    content = matrix_product_model(3, 5, 2)
    onnx.checker.check_model(onnx.load_from_string(content))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    a, b = random.normal(size=(3, 5)).astype(np.float32), random.normal(size=(5, 2)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"A": a, "B": b})[0], a @ b, rtol=1e-5)
