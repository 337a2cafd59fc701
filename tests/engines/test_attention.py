"""Attention on a GPU by its own kernel, through ONNX Runtime, beside NumPy in float64."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

import diagd.engines.attention as attention
import diagd.engines.devices.kernels as kernels
from diagd.engines.attention import HEAD_SIZES, Loader, attention_operators
from diagd.engines.devices.cuda import CudaDevice
from diagd.engines.devices.kernels import compile_attention
from diagd.engines.onnxruntime_session import open_cuda_session
from diagd.errors import EngineError
from tests.engines.host_device import ROOT

HIDDEN = -30_000.0
SHAPES = {  # streams, heads, rows, slots
    "one row": (1, 4, 1, 700),
    "rows of a frontier": (1, 8, 40, 1037),
    "more rows than a block has": (1, 2, 300, 512),
    "streams": (3, 2, 20, 160),
    "fewer slots than a tile": (1, 1, 5, 20),
    "one split": (2, 80, 33, 64),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    file = tmp_path_factory.mktemp("operators") / "operators.so"
    sources = [str(ROOT / "native" / name) for name in ("step_kernels_host.cpp", "onnxruntime_ops.cpp")]
    compile_line = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", *sources, "-o", str(file), "-ldl"]
    subprocess.run(compile_line, check=True)
    return ctypes.CDLL(str(file))


@pytest.fixture
def device() -> Any:
    pytest.importorskip("cuda.bindings.driver")
    try:
        device = CudaDevice()
    except EngineError as error:
        pytest.skip(f"skipped: {error}" if "no CUDA device" in str(error) else str(error))
    yield device
    device.close()


def offered(device: Loader, library: ctypes.CDLL, size: int, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """What a session over float16 heads of a size is offered."""
    monkeypatch.setattr(attention, "host_build", lambda: library)
    cache = SimpleNamespace(head_size=size)
    manifest: Any = SimpleNamespace(cache=cache, cache_dtype=lambda graph: np.dtype(np.float16))
    return attention_operators(manifest, manifest, device)


def graph(path: Path, queries: tuple[int, ...], keys: tuple[int, ...], mask: tuple[int, ...]) -> Path:
    """A model of one Attention-24."""
    shapes = {"q": queries, "k": keys, "v": keys, "m": mask}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, s) for n, s in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, queries)
    node = helper.make_node("Attention", [*shapes], ["y"], scale=queries[-1] ** -0.5)
    model = helper.make_model(
        helper.make_graph([node], "attention", inputs, [output]), opset_imports=[helper.make_opsetid("", 24)]
    )
    model.ir_version = 11
    onnx.save(model, path)
    return path


def reference(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    q, k, v, mask = (array.astype(np.float64) for array in (q, k, v, mask))
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5 + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_is_that_of_numpy(
    device: CudaDevice,
    library: ctypes.CDLL,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int, int],
    size: int,
) -> None:
    streams, heads, rows, slots = shape
    random = np.random.default_rng(size + slots)
    q = (random.standard_normal((streams, heads, rows, size)) * 2).astype(np.float16)
    k, v = random.standard_normal((2, streams, heads, slots, size)).astype(np.float16)
    visible = random.random((streams, 1, rows, slots)) < random.random((streams, 1, rows, 1))
    visible[..., slots // 3 : slots // 2] = False  # whole tiles that none sees
    visible[..., random.integers(slots // 3)] = True
    mask = np.where(visible, 0, HIDDEN).astype(np.float16)
    mask = mask[0, 0] if streams == 1 else mask
    path = graph(tmp_path / "attention.onnx", q.shape, k.shape, mask.shape)
    session = open_cuda_session(path, strict=True, operators=offered(device, library, size, monkeypatch))
    (found,) = session.run(None, {"q": q, "k": k, "v": v, "m": mask})
    wanted = reference(q, k, v, mask)
    assert np.linalg.norm(found - wanted) < 2e-3 * np.linalg.norm(wanted)
    assert np.abs(found - wanted).max() < 2e-2


def test_rows_that_see_nothing_are_finite_and_another_size_is_refused(
    device: CudaDevice, library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones = np.ones((1, 1, 20, 64), np.float16)
    mask = np.full((20, 20), HIDDEN, np.float16)
    mask[1] = 0  # rows from 16 on belong to a warp that sees nothing at all
    path = graph(tmp_path / "attention.onnx", ones.shape, ones.shape, mask.shape)
    feeds = {"q": ones, "k": ones, "v": ones, "m": mask}
    session = open_cuda_session(path, operators=offered(device, library, 64, monkeypatch))
    np.testing.assert_array_equal(session.run(None, feeds)[0][0, 0, :, 0], [1] * 16 + [0] * 4)
    other = open_cuda_session(path, operators=offered(device, library, 128, monkeypatch))
    with pytest.raises(Exception, match="another head size"):  # ONNX Runtime's own type
        other.run(None, feeds)


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_nvrtc_compiles_the_kernel(size: int) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    code = compile_attention(90, size)
    assert b"diagd_attend" in code and code[:4] == b"\x7fELF"


def test_heads_of_other_sizes_are_left_to_the_provider(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, architecture in ((48, 90), (64, 75)):
        device: Any = SimpleNamespace(architecture=architecture)
        assert offered(device, library, size, monkeypatch) is None


def test_without_a_compiler_steps_have_the_providers_attention(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the other kernels came compiled: their sources are not in the package."""
    monkeypatch.setattr(kernels, "__file__", str(ROOT.parent / "a" / "b" / "c" / "kernels.py"))
    device: Any = SimpleNamespace(architecture=90)
    assert offered(device, library, 64, monkeypatch) is None


def test_splits_fit_the_memory_that_they_are_given(library: ctypes.CDLL) -> None:
    library.diagd_attend_floats.restype = library.diagd_attend_needs.restype = ctypes.c_int64
    given = {size: library.diagd_attend_floats(132, size) for size in HEAD_SIZES}
    for heads in (1, 2, 5, 8, 33, 200):
        for rows in (1, 15, 16, 17, 64, 112, 160, 193, 288, 1000):
            for slots in (1, 32, 33, 500, 2560, 12_800, 131_072):
                needed = library.diagd_attend_needs(heads, rows, slots, 132, 128)
                assert 0 <= needed <= given[128]
