"""An int8 cache in the executor for devices, and in engines that TensorRT-RTX compiles."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle, Form
from diagd.engines.executor import Executor
from diagd.engines.tensorrt import Capabilities
from diagd.engines.tensorrt.builder import estimate
from diagd.engines.tensorrt.opening import usable_forms
from diagd.errors import EngineError
from diagd.schedule import Schedule, StreamLayout
from tests.calibration.int8_cache import WIDTHS, export_rounded, grouped_model, random_scales
from tests.engines.fidelity import Run, decode
from tests.engines.host_device import HostDevice, executor_over, host_kernels
from tests.engines.opening import portable

LAYOUT = StreamLayout(3, 5, after=2)
SLIDING = Run(Schedule.chained(LAYOUT, 2), frames=11, prompt=1, window=3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = grouped_model(LAYOUT)
    return export_rounded(model, tmp_path_factory.mktemp("int8") / "small.diagd", random_scales(model))


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    return host_kernels()


def device_engine(bundle: Bundle, tokens: int, device: HostDevice) -> Executor:
    return executor_over(bundle, Form.PORTABLE, tokens, device)


def test_a_device_decodes_what_the_cpu_decodes(bundle: Bundle, kernels: ctypes.CDLL) -> None:
    """Rows of one 16-byte chunk, appended by the kernel; a window that slides and keys that are turned."""
    devices: list[tuple[HostDevice, Executor]] = []

    def make(bundle: Bundle, tokens: int) -> Executor:
        device = HostDevice(kernels)
        devices.append((device, device_engine(bundle, tokens, device)))
        return devices[-1][1]

    np.testing.assert_array_equal(decode(bundle, make, SLIDING), decode(bundle, portable, SLIDING))
    device, engine = devices[0]
    assert {tensor.dtype for tensor in engine.tensors.cache.values()} == {np.dtype(np.int8)}
    cache = bundle.manifest.cache
    size = cache.kv_heads * engine.capacity * cache.head_size
    assert device.log.count(("allocate", size)) == 2 * cache.layers


def test_rows_that_the_kernel_cannot_move_are_refused(bundle: Bundle, kernels: ctypes.CDLL) -> None:
    cache = bundle.manifest.cache.model_copy(update={"head_size": 24})
    narrow = Bundle(bundle.path, bundle.manifest.model_copy(update={"cache": cache}))
    with pytest.raises(EngineError, match=r"24 values of int8 has 24 bytes.* multiple of 16 channels"):
        device_engine(narrow, 80, HostDevice(kernels))


def test_memory_is_counted_in_bytes_of_the_cache(bundle: Bundle) -> None:
    graph = bundle.manifest.graph(Form.PORTABLE)
    plain = graph.model_copy(update={"cache_dtype": None})
    assert 4 * estimate(bundle, graph, WIDTHS).cache == estimate(bundle, plain, WIDTHS).cache


def test_every_tensorrt_takes_the_form_that_there_is(bundle: Bundle) -> None:
    later = Capabilities("tensorrt", "11.4.0", True, True, True, (), True)
    assert later.form is Form.MODERN
    assert usable_forms(bundle, later) == (Form.PORTABLE,)


def compiles(bundle: Bundle) -> bool:
    rtx = pytest.importorskip("tensorrt_rtx")
    from diagd.engines.tensorrt.builder import Builder, Request

    graph = bundle.file(bundle.manifest.graph(Form.PORTABLE).file)
    build = Builder(rtx).build(graph, Request(40, None, WIDTHS, ("sm89",)))
    tensors = 2 * bundle.manifest.cache.layers
    assert build.log == ()
    return build.layers["QUANTIZE"] == tensors and build.layers["DEQUANTIZE"] == 2 * tensors


def test_tensorrt_compiles_it(bundle: Bundle) -> None:
    assert compiles(bundle)


def test_tensorrt_compiles_it_in_half_precision(tmp_path: Path) -> None:
    """QuantizeLinear takes float16 from opset 19 on, which is why the graph declares a later one."""
    model = grouped_model(LAYOUT, layers=1, rotary=False, kv_heads=4)
    assert compiles(export_rounded(model, tmp_path / "small.diagd", random_scales(model), "fp16"))
