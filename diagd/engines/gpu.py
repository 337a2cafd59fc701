"""GPUs: NVIDIA's by TensorRT's engines or ONNX Runtime's CUDA provider, any maker's by its WebGPU provider.

The last is experimental.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diagd.bundle import Bundle, Form, Manifest
from diagd.bundle.manifest import StepGraph
from diagd.engines.backend import Backend, Graph, StepOptions, as_graph, graphs_of, widths_of
from diagd.engines.ceilings import Ceilings, device_ceilings
from diagd.engines.devices import Device, KernelDevice
from diagd.engines.devices.cuda import CudaDevice, describe_device, open_driver
from diagd.engines.devices.kernels import (
    ATTENTION,
    LAYER,
    OperatorArguments,
    compile_attention,
    compile_layer,
    host_build,
)
from diagd.engines.engine import Engine, Float
from diagd.engines.executor import Executor
from diagd.engines.onnxruntime_session import CpuOptions, OnnxRuntimeProgram, load_session, open_cuda_session
from diagd.engines.prefix import GRANULE, MAX_WIDTH, PlainPrefix
from diagd.engines.processor import Processor
from diagd.engines.tensorrt import import_tensorrt
from diagd.engines.tensorrt.builder import Builder, Request
from diagd.engines.tensorrt.opening import TensorRTProgram, open_tensorrt
from diagd.engines.tensors import Program, Tensor, rotate_pairs
from diagd.errors import DependencyError, EngineError, require

AnyDevice = TypeVar("AnyDevice", bound=Device)

PROVIDER: Final = "WebGpuExecutionProvider"
DEVICE: Final = "webgpu"

HEAD_SIZES: Final = (32, 64, 96, 128)
"""Of our attention; others would leave parts of a matrix instruction empty, or not fit the registers."""

LEAST_ARCHITECTURE: Final = 80
"""Compute capability with asynchronous copies and the instruction that the kernels use."""

VECTOR: Final = 8
"""Elements that a thread reads at a time: rows are whole numbers of them."""

KEPT_BYTES: Final = 1024
"""Of a block's memory, for what a kernel has there by itself and what the driver keeps."""

MOST_HIDDEN: Final = 8192
"""A block has a row, and a thread eight elements of it."""


class Cuda(Backend):
    """ONNX Runtime's CUDA provider, on the first GPU."""

    name = "cuda"
    forms: tuple[Form, ...] = (Form.MODERN,)

    @override
    def describe(self) -> str:
        described = describe_device(open_driver())
        return f"{described.name}, driver {described.driver}, {self.name}"

    @override
    def open_steps(self, bundle: Bundle, options: StepOptions) -> Engine:
        with closed_on_failure(CudaDevice()) as device:
            return open_cuda(bundle, device, options)

    @override
    def open_graph(self, path: Path, digest: str, options: CpuOptions) -> Graph:
        """Pixels and texts stay on the GPU that decodes their tokens."""
        return as_graph(open_cuda_session(path))

    @override
    def ceilings(self, threads: int = 0) -> Ceilings:
        """The product is that of the backend's own library."""
        with closing(CudaDevice()) as device:
            return device_ceilings(device, partial(self._product, device))

    def _product(self, device: Device, model: Path, rows: int, tensors: Mapping[str, Tensor]) -> Program:
        session = open_cuda_session(model, stream=device.stream)
        return OnnxRuntimeProgram(session, tensors, (rows,), device.kind)


class TensorRT(Cuda):
    """Engines compiled by diagd-build, of either TensorRT: whichever is installed.

    Plain graphs run on ONNX Runtime's CUDA provider.
    """

    name = "tensorrt"
    forms = (Form.MODERN, Form.PORTABLE)
    runtime: str | None = None

    @override
    def open_steps(self, bundle: Bundle, options: StepOptions) -> Engine:
        with closed_on_failure(CudaDevice()) as device:
            return open_tensorrt(bundle, options, device, runtime=self.runtime)

    def _product(self, device: Device, model: Path, rows: int, tensors: Mapping[str, Tensor]) -> Program:
        trt = import_tensorrt(self.runtime)
        plan = model.with_suffix(".plan")
        plan.write_bytes(Builder(trt).build(model, Request(widths=(rows,))).plan)
        return TensorRTProgram(trt, plan, (rows,), tensors, device.stream)


class TensorRTRTX(TensorRT):
    """Engines of TensorRT-RTX."""

    name = runtime = "tensorrt_rtx"


@contextmanager
def closed_on_failure(device: AnyDevice) -> Iterator[AnyDevice]:
    """Give a device's memory back if what is opened on it cannot be opened; else it lives on."""
    try:
        yield device
    except BaseException:
        device.close()
        raise


def open_cuda(bundle: Bundle, device: CudaDevice, options: StepOptions) -> Executor:
    """The ``modern`` form on ONNX Runtime's CUDA provider, on a device that is open."""
    steps = graphs_of(bundle, Form.MODERN)
    session = open_cuda_session(
        bundle.file(steps[0].file),
        stream=device.stream,
        graphs=options.graphs,
        strict=options.strict,
        operators=step_operators(bundle.manifest, steps[0], device),
    )
    widths = widths_of(steps)
    bind = partial(OnnxRuntimeProgram, session, widths=widths, kind=device.kind)
    return Executor(bundle.manifest, steps[0], widths, options, device, bind)


def step_operators(manifest: Manifest, graph: StepGraph, device: KernelDevice) -> Path | None:
    """The library that the next session registers, to run functions of a step on kernels; None: it cannot.

    ONNX Runtime's own are 19 launches between the products of a layer, these four, one between two products
    (``layer.cu``). Its attention has a block to each head and 64 rows: a step has few of either and thousands
    of slots, so that most of a GPU stood idle, and an H200 spent 80 to 90 % of a step there
    (``attention.cu``).

    It cannot where the cache is not float16, heads or rows have another size, the GPU is older, or nothing
    was or can be compiled: ONNX Runtime then puts the operators of a function in its place.
    """
    library, size = host_build(), manifest.transformer.head_size
    if library is None or not suits(manifest, graph) or device.architecture < LEAST_ARCHITECTURE:
        return None
    try:
        code = compile_attention(device.architecture, size), compile_layer(device.architecture)
    except DependencyError:  # where the other kernels were compiled ahead, NVRTC may be missing
        return None
    block_bytes = device.block_bytes - KEPT_BYTES
    functions = device.load(code[0], ATTENTION, library.diagd_attend_shared(size, block_bytes))
    functions = {**device.load(code[1], LAYER), **functions}
    arguments = OperatorArguments()
    arguments.functions[:] = [int(functions[name]) for name in (*LAYER, *ATTENTION)]
    library.diagd_attend_bytes.restype = ctypes.c_int64
    arguments.between = device.allocate(library.diagd_attend_bytes(device.processors, size))
    arguments.processors, arguments.block_bytes, arguments.size = device.processors, block_bytes, size
    library.diagd_operators_with(ctypes.byref(arguments))
    return Path(library._name)


def suits(manifest: Manifest, graph: StepGraph) -> bool:
    """Whether kernels take a graph's types and sizes."""
    config = manifest.transformer
    return (
        manifest.cache_dtype(graph) == np.float16
        and config.head_size in HEAD_SIZES
        and config.hidden % VECTOR == config.feed_forward % VECTOR == 0
        and config.hidden <= MOST_HIDDEN
    )


class WebGpu(Backend):
    """Runs the prefix form; graphs of pixels and texts, whose operators it lacks, stay on the processor."""

    name = "webgpu"
    forms = (Form.PREFIX,)

    @override
    def describe(self) -> str:
        return f"{_adapter().device.vendor} GPU, {self.name}"

    @override
    def open_steps(self, bundle: Bundle, options: StepOptions) -> Engine:
        return WebGpuEngine(bundle, options.slots, options.tokens)

    @override
    def open_graph(self, path: Path, digest: str, options: CpuOptions) -> Graph:
        return Processor().open_graph(path, digest, options)

    @override
    def ceilings(self, threads: int = 0) -> Ceilings:
        raise EngineError(
            f"{self.name} measures no limits of a GPU; diagd profile --backends compares frames"
        )


class WebGpuEngine(PlainPrefix):
    """K/V rows stay on the GPU, bound by prefix as input and output of each step, and so do weights.

    Raises:
        DependencyError: the provider is not installed.
        EngineError: there is no GPU, or it refuses the graph.
    """

    def __init__(self, bundle: Bundle, capacity: int, tokens: int) -> None:
        runtime, adapter = _runtime(), _adapter()
        super().__init__(bundle.manifest, -(-capacity // GRANULE) * GRANULE, tokens, MAX_WIDTH)
        graph = bundle.file(graphs_of(bundle, Form.PREFIX)[0].file)
        settings = runtime.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        settings.add_provider_for_devices([adapter], {})
        self._session = load_session(runtime, graph, settings)
        self._values = {
            name: runtime.OrtValue.ortvalue_from_numpy(buffer, DEVICE, 0)
            for name, buffer in self.buffers.items()
        }

    @override
    def forward(self, feeds: Mapping[str, NDArray[Any]], live: int) -> Float:
        """Inputs are copied up as they are bound, so each step binds its own."""
        length = -(-live // GRANULE) * GRANULE
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array[:length] if name == "slot_position" else array)
        for name, value in self._values.items():
            described = (np.float32, (length, 1, *value.shape()[1:]), value.data_ptr())
            binding.bind_input(f"past_{name}", DEVICE, 0, *described)
            binding.bind_output(f"present_{name}", DEVICE, 0, *described)
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        logits: Float = binding.get_outputs()[-1].numpy()  # in the order of binding
        return logits

    @override
    def rotate_keys(self, angles: NDArray[np.float64], live: int, lane: int = 0) -> None:
        """Once per context, so the host does it."""
        for name, value in self._values.items():
            if name.startswith("key"):
                keys = value.numpy()
                rotate_pairs(keys[:live], angles)
                value.update_inplace(keys)

    @override
    def close(self) -> None:
        super().close()
        self._values.clear()


def _runtime() -> Any:
    return require("onnxruntime", extra="webgpu", purpose="run step graphs on WebGPU")


def _adapter() -> Any:
    """The first GPU; DependencyError where the provider is absent, EngineError where it finds none."""
    _load_provider()
    found = [device for device in _runtime().get_ep_devices() if device.ep_name == PROVIDER]
    if not found:
        raise EngineError(
            "ONNX Runtime's WebGPU provider finds no GPU here; install its driver (Linux: Vulkan)"
        )
    return found[0]


@cache
def _load_provider() -> None:
    """Load the plug-in; once in a process."""
    provider = require("onnxruntime_ep_webgpu", extra="webgpu", purpose="run step graphs on WebGPU")
    try:
        _runtime().register_execution_provider_library(DEVICE, provider.get_library_path())
    except Exception as error:  # ONNX Runtime raises several unrelated types
        raise EngineError(
            f"ONNX Runtime's WebGPU provider cannot be loaded, on Linux it needs libvulkan.so.1: {error}"
        ) from error
