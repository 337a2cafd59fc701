"""A GPU of any maker, by ONNX Runtime's WebGPU provider: experimental."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diagd.bundle import Bundle, Form
from diagd.engines.backend import Backend, Graph, StepOptions, graphs_of
from diagd.engines.ceilings import Ceilings
from diagd.engines.engine import Engine, Float
from diagd.engines.onnxruntime_session import CpuOptions, load_session
from diagd.engines.prefix import GRANULE, MAX_WIDTH, PlainPrefix
from diagd.engines.processor import Processor
from diagd.engines.tensors import rotate_pairs
from diagd.errors import EngineError, require

PROVIDER: Final = "WebGpuExecutionProvider"
DEVICE: Final = "webgpu"


class WebGpu(Backend):
    """Runs the prefix form; graphs of pixels and texts, whose operators it lacks, stay on the processor."""

    name = "webgpu"
    forms = (Form.PREFIX,)

    @override
    def describe(self) -> str:
        """The adapter."""
        return f"{_adapter().device.vendor} GPU, {self.name}"

    @override
    def open_steps(self, bundle: Bundle, options: StepOptions) -> Engine:
        graphs_of(bundle, Form.PREFIX)
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
        graph = bundle.file(bundle.manifest.graph(Form.PREFIX).file)
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
    """The first GPU.

    Raises:
        DependencyError: the provider is not installed.
        EngineError: it cannot be loaded, or finds no GPU.
    """
    _load_provider()
    found = [device for device in _runtime().get_ep_devices() if device.ep_name == PROVIDER]
    if not found:
        raise EngineError("ONNX Runtime's WebGPU provider finds no GPU here; install its Vulkan driver")
    return found[0]


@cache
def _load_provider() -> None:
    """Load the plug-in; once in a process."""
    provider = require("onnxruntime_ep_webgpu", extra="webgpu", purpose="run step graphs on WebGPU")
    try:
        _runtime().register_execution_provider_library(DEVICE, provider.get_library_path())
    except Exception as error:  # ONNX Runtime raises several unrelated types
        raise EngineError(
            f"ONNX Runtime's WebGPU provider cannot be loaded, it needs libvulkan.so.1: {error}"
        ) from error
