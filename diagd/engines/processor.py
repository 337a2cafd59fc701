"""The processor: ONNX Runtime's CPU provider, for every form, and plainly, to compare with; and OpenVINO."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import INT8_CACHE
from diagd.bundle.precision import FLOATING, PRECISIONS
from diagd.engines.backend import (
    Arrays,
    Backend,
    Graph,
    StepOptions,
    as_graph,
    choose_form,
    graphs_of,
    widths_of,
)
from diagd.engines.ceilings import (
    SIDE,
    Ceilings,
    matrix_peak,
    matrix_product_model,
    memory_bandwidth,
    product_peak,
)
from diagd.engines.devices.host import HostDevice
from diagd.engines.engine import Engine, Float
from diagd.engines.executor import Executor
from diagd.engines.host import cores, instruction_sets, sums_eight_bits
from diagd.engines.onnxruntime_session import (
    CpuOptions,
    OnnxRuntimeProgram,
    open_cpu_session,
    open_plainly,
    open_step_session,
    refused,
)
from diagd.engines.prefix import PlainPrefix, PrefixEngine
from diagd.engines.tensors import Tensor, check_shapes
from diagd.errors import BundleError, EngineError, require

BFLOAT16_UNITS: Final = frozenset({"amx_bf16", "avx512_bf16"})
"""Instruction sets that multiply bfloat16; without one OpenVINO would compute it more slowly than float32."""


class Processor(Backend):
    """Runs the prefix form, whose cost follows the slots in use; the forms of GPUs too, to compare with."""

    name = "cpu"
    forms = (Form.PREFIX, Form.MODERN, Form.PORTABLE)

    @override
    def open_steps(self, bundle: Bundle, options: StepOptions) -> Engine:
        form = choose_form(bundle, options.form, self.forms)
        if form is Form.PREFIX:
            return PrefixEngine(bundle, options)
        return open_fixed(bundle, form, options)

    @override
    def open_graph(self, path: Path, digest: str, options: CpuOptions) -> Graph:
        return as_graph(open_cpu_session(path, digest, options))

    @override
    def ceilings(self, threads: int = 0) -> Ceilings:
        threads = threads or cores()
        return Ceilings(*memory_bandwidth(threads), matrix_peak(threads), threads)


def open_fixed(bundle: Bundle, form: Form, options: StepOptions) -> Executor:
    """The executor over memory of the host, on one session that runs at every width."""
    graphs = graphs_of(bundle, form)
    session, widths = open_step_session(bundle, graphs[0], options.cpu), widths_of(graphs)
    bind = partial(OnnxRuntimeProgram, session, widths=widths, kind="cpu")
    return Executor(bundle.manifest, graphs[0], widths, options, HostDevice(), bind)


class ReferenceEngine(PlainPrefix):
    """FP32 on ONNX Runtime's CPU provider with everything off that could go wrong.

    No graph optimisation, no packed weights, no cache in place, no live prefix, one thread: arrays in,
    arrays out, the whole capacity every time. ``max_width`` is another engine's where both are to run the
    same steps.

    Raises:
        BundleError: the bundle has no such graph.
    """

    def __init__(self, bundle: Bundle, capacity: int, tokens: int, max_width: int) -> None:
        manifest = bundle.manifest
        graph = next((g for g in manifest.graphs if g.form is Form.PREFIX and g.precision == "fp32"), None)
        if graph is None:
            raise BundleError(
                f"{bundle.path} has no FP32 graph in the prefix form to compare with; export the same "
                "weights with --form prefix and give that bundle as --reference"
            )
        session = open_plainly(bundle.file(graph.file))
        super().__init__(manifest, capacity, tokens, max_width)
        self._session = session

    @override
    def forward(self, feeds: Mapping[str, NDArray[Any]], live: int) -> Float:
        """The whole capacity, into new buffers."""
        past = {f"past_{name}": buffer[:, None] for name, buffer in self.buffers.items()}
        outputs = self.evaluate({**feeds, **past}, ["logits", *(f"present_{name}" for name in self.buffers)])
        logits = outputs.pop("logits")
        self.buffers = {name: rows[:, 0] for name, rows in zip(self.buffers, outputs.values(), strict=True)}
        return logits


class OpenVino(Backend):
    """Runs step graphs in bfloat16 where the processor multiplies it, else in float32.

    It copies a cache that a graph writes, so it runs the form whose cache is read-only.
    """

    name = "openvino"
    forms = (Form.PORTABLE,)
    floats = "bf16" if BFLOAT16_UNITS & instruction_sets() else "fp32"

    @override
    def describe(self) -> str:
        _library()
        return ""

    @override
    def computes(self, precision: str) -> str:
        """Of a graph in floating point what this processor suggests; quantised products are what they are."""
        return self.floats if precision in FLOATING else precision

    @override
    def open_steps(self, bundle: Bundle, options: StepOptions) -> Engine:
        graphs = graphs_of(bundle, Form.PORTABLE)
        if PRECISIONS[graphs[0].precision.removesuffix(INT8_CACHE)].scaling and not sums_eight_bits():
            raise EngineError(
                f"{self.name} sums products of {graphs[0].precision} in 16 bits on a processor without VNNI, "
                "and they overflow; take --set backend=cpu, whose sums are exact, or another precision"
            )
        compiled = _compile(bundle.file(graphs[0].file), options.cpu.threads, self.floats)
        widths = widths_upto(int(graphs[-1].width or 0))
        bind = partial(OpenVinoProgram, compiled, widths=widths)
        return Executor(bundle.manifest, graphs[0], widths, options, HostDevice(), bind)

    @override
    def open_graph(self, path: Path, digest: str, options: CpuOptions) -> Graph:
        """In float32: pictures and their tokens are those of the other backends."""
        compiled = _compile(path, options.threads, "fp32")
        # a compiled output has the names of all values that became one; that of the file ends its node's
        names = [port.node.friendly_name.partition("/sink_port")[0] for port in compiled.outputs]
        request = compiled.create_infer_request()

        def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
            request.infer(dict(feeds))
            return {name: request.get_output_tensor(n).data.copy() for n, name in enumerate(names)}

        return run

    @override
    def ceilings(self, threads: int = 0) -> Ceilings:
        """The product is OpenVINO's own, in the floating point of its step graphs."""
        threads = threads or cores()
        model = matrix_product_model(SIDE, SIDE, SIDE)
        request = _compile(model, threads, self.floats).create_infer_request()
        factors = {name: np.ones((SIDE, SIDE), np.float32) for name in ("A", "B")}
        return Ceilings(*memory_bandwidth(threads), product_peak(lambda: request.infer(factors)), threads)


class OpenVinoFloat32(OpenVino):
    """The same in float32 on every processor."""

    name = "openvino_fp32"
    floats = "fp32"


def widths_upto(widest: int) -> tuple[int, ...]:
    """Widths of steps, whatever those of the graph's record are: its width is open.

    A pad row costs a processor what any row costs, and a width costs a first run when the engine is opened:
    they are close where steps of a schedule are narrow.
    """
    ranges = (range(1, 8), range(8, 16, 2), range(16, 32, 4), range(32, widest, 16))
    return (*(width for steps in ranges for width in steps if width < widest), widest)


class OpenVinoProgram:
    """A compiled step graph of open width, a request for each one bound to the tensors; see ``Program``."""

    capturable = False

    def __init__(self, compiled: Any, tensors: Mapping[str, Tensor], widths: tuple[int, ...]) -> None:
        there = {
            _name(port, tensors): [size.get_length() if size.is_static else -1 for size in port.partial_shape]
            for port in (*compiled.inputs, *compiled.outputs)
        }
        inputs = [_name(port, tensors) for port in compiled.inputs]
        check_shapes(there, inputs, {name: tensor.shape for name, tensor in tensors.items()})
        self._requests = {width: _bound(compiled, tensors, width) for width in widths}

    def enqueue(self, width: int) -> None:
        """Run one step of ``width`` rows."""
        self._requests[width].infer()


def _bound(compiled: Any, tensors: Mapping[str, Tensor], width: int) -> Any:
    """A request that reads and writes the tensors where they are."""
    library, request = _library(), compiled.create_infer_request()
    for port in (*compiled.inputs, *compiled.outputs):
        tensor = tensors[_name(port, tensors)]
        array = array_at(tensor, tensor.at_width(width))
        request.set_tensor(port, library.Tensor(array, shared_memory=True))
    return request


def _name(port: Any, tensors: Mapping[str, Tensor]) -> str:
    """Of the names of a port, which may be several, that of a tensor; any where it is none's."""
    names: set[str] = port.names
    return min(names, key=lambda name: name not in tensors)


def array_at(tensor: Tensor, shape: tuple[int, ...]) -> NDArray[Any]:
    """The memory of a tensor of the host."""
    memory = (ctypes.c_uint8 * (math.prod(shape) * tensor.dtype.itemsize)).from_address(tensor.address)
    array: NDArray[Any] = np.ctypeslib.as_array(memory).view(tensor.dtype).reshape(shape)
    return array


def _library() -> Any:
    return require("openvino", extra="openvino", purpose="run graphs on OpenVINO")


def _compile(model: Path | bytes, threads: int, floats: str) -> Any:
    """A graph, in an ONNX file or as its content, compiled for the processor.

    ``floats`` is always said, for OpenVINO's own choice depends on the machine. DependencyError where it is
    not installed, EngineError where it refuses the graph.
    """
    library = _library()
    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[floats],
        "INFERENCE_NUM_THREADS": threads or cores(),
        "NUM_STREAMS": 1,
    }
    try:
        core = library.Core()
        return core.compile_model(
            core.read_model(str(model) if isinstance(model, Path) else model), "CPU", settings
        )
    except RuntimeError as error:
        named = f"OpenVINO {library.__version__}"
        if isinstance(model, Path):
            raise refused(named, model, error) from error
        raise EngineError(f"{named} refuses a matrix product: {error}") from error
