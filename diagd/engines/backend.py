"""Backends: what opens step graphs and plain graphs, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, cast, runtime_checkable

from numpy.typing import DTypeLike, NDArray

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import StepGraph
from diagd.engines.ceilings import Ceilings
from diagd.engines.engine import Engine
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import BundleError, unknown

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Graph: TypeAlias = Callable[[Arrays], dict[str, NDArray[Any]]]
"""A plain graph: arrays by name of its outputs, from arrays by name of its inputs."""

GROUP: Final = "diagd.backends"
"""Entry points that name further backends, each a class without arguments."""

_MODULES: Final = {
    "cpu": "diagd.engines.processor:Processor",
    "openvino": "diagd.engines.processor:OpenVino",
    "openvino_fp32": "diagd.engines.processor:OpenVinoFloat32",
    "webgpu": "diagd.engines.gpu:WebGpu",
    "cuda": "diagd.engines.gpu:Cuda",
    "tensorrt": "diagd.engines.gpu:TensorRT",
    "tensorrt_rtx": "diagd.engines.gpu:TensorRTRTX",
}

CHOICES: Final = ", ".join(_MODULES)
"""The backends that are built in, for help."""

CPU: Final = "cpu"
"""The backend where none is named."""


@dataclass(frozen=True)
class StepOptions:
    """How a step graph is opened.

    Attributes:
        slots: of the K/V buffers, where the graph leaves it open.
        tokens: size of the token buffer.
        cpu: for what runs on the processor.
        form: of the step graph; None: the backend's first that the bundle has.
        graphs: capture and replay graphs of the device.
        strict: refuse a graph of which nodes are left to the processor.
        streams: that share a pass.
        watch: further outputs to hand out, by their channels and element type; None: a tensor of the step.
    """

    slots: int
    tokens: int
    cpu: CpuOptions = field(default_factory=CpuOptions)
    form: Form | None = None
    graphs: bool = True
    strict: bool = False
    streams: int = 1
    watch: Mapping[str, tuple[int, DTypeLike] | None] | None = None


@runtime_checkable
class Backend(Protocol):
    """Opens graphs on one kind of hardware.

    Attributes:
        name: in the registry.
        forms: of step graphs that it runs, best first.
    """

    name: str
    forms: tuple[Form, ...]

    def describe(self) -> str:
        """The device and its driver, '' for the processor; EngineError where there is none."""
        return ""

    def computes(self, precision: str) -> str:
        """The precision that a step graph of one is computed in, which says what it must reach."""
        return precision

    def open_steps(self, bundle: Bundle, options: StepOptions) -> Engine:
        """An engine over the step graphs of one form.

        Raises:
            BundleError: the bundle has no graph that this backend runs.
            EngineError: there is no device, or it refuses the graph.
            DependencyError: a package is missing.
        """

    def open_graph(self, path: Path, digest: str, options: CpuOptions) -> Graph:
        """A plain graph, as of a pixel tokenizer; ``digest`` is the file's."""

    def ceilings(self, threads: int = 0) -> Ceilings:
        """The limits of the hardware, measured now; nothing else may run on it.

        ``threads``: of the processor that an engine on it would use; 0 is one for each core.

        Raises:
            EngineError: there is no device, or it refuses the product.
            DependencyError: a package is missing.
        """


def as_graph(session: Any) -> Graph:
    """What a session of ONNX Runtime makes of arrays."""
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def names() -> tuple[str, ...]:
    """Every backend there is, whether its packages are installed or not."""
    return (*_MODULES, *sorted(point.name for point in entry_points(group=GROUP)))


def find(name: str) -> Backend:
    """The backend of a name; UsageError where there is none."""
    if name in _MODULES:
        module, _, attribute = _MODULES[name].partition(":")
        return cast(Backend, getattr(import_module(module), attribute)())
    for point in entry_points(group=GROUP):
        if point.name == name:
            return cast(Backend, point.load()())
    raise unknown("backend", name, names())


def forms_of(bundle: Bundle) -> list[Form]:
    """Forms of a bundle's step graphs, each once."""
    return list(dict.fromkeys(graph.form for graph in bundle.manifest.graphs))


def graphs_of(bundle: Bundle, form: Form) -> list[StepGraph]:
    """The bundle's graphs of a form, narrowest first; BundleError where it has none."""
    graphs = [graph for graph in bundle.manifest.graphs if graph.form is form]
    if not graphs:
        raise BundleError(
            f"{bundle.path} has no {form.value} graph; export it again with --form {form.value}"
        )
    return sorted(graphs, key=lambda graph: graph.width or 0)


def widths_of(graphs: Sequence[StepGraph]) -> tuple[int, ...]:
    """Rows of the steps that graphs of fixed width take."""
    return tuple(int(graph.width or 0) for graph in graphs)


def choose_form(bundle: Bundle, wanted: Form | None, forms: tuple[Form, ...]) -> Form:
    """The form to run: the one wanted, or the backend's first that the bundle has."""
    there = forms_of(bundle)
    return wanted or next((form for form in forms if form in there), forms[0])
