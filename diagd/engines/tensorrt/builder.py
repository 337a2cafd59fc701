"""Compiles a step graph: parse, tell attention how many slots are live, fix the widths, build.

How much memory that takes is told before the first minute is spent.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import StepGraph
from diagd.engines import host
from diagd.engines.tensorrt import Capabilities, capabilities
from diagd.errors import EngineError
from diagd.options import NAMES, Numbers, checked, flag, setting
from diagd.progress import Progress

HARMLESS = ("has Int64 binding", "will not be queryable")
"""Said of every graph: ONNX wants the write index as int64, and it is bound as that; and a function's nodes
have the same names wherever it is called."""

LIVE_INPUT = "live"
"""Input int32 [1] added to engines of the modern form: slots in use, so that attention reads no others."""

DYNAMIC = -1

BUILD_BASE_BYTES = 500_000_000
"""TensorRT's builder itself, before any weight."""

BUILD_COPIES = 4
"""Copies of the weights alive at the peak of a build, for each copy in the plan."""

PLAN_COPIES = 2
"""Copies of the weights in a plan of several widths: width 1 has matrix-vector kernels and its own layout."""

# All three are measured: mineworld-300m in float16 under TensorRT-RTX 1.7, 0.64 GB of weights, takes 2.9 GB
# at widths 16 and 64 (plan 0.67 GB) and 4.7 GB at widths 1, 16 and 64 (plan 1.30 GB).


@dataclass(frozen=True)
class LogLine:
    """One message: severity as TensorRT names it (``ERROR``, ``WARNING``, ...) and text."""

    severity: str
    text: str


def make_logger(trt: ModuleType, lines: list[LogLine]) -> Any:
    """A ``trt.ILogger`` that appends warnings and errors to ``lines`` and prints nothing."""
    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]
        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.INFO, trt.ILogger.VERBOSE) or any(part in text for part in HARMLESS):
                return
            lines.append(LogLine(str(severity).rpartition(".")[2], text))

    return Logger()


def errors_of(lines: list[LogLine]) -> str:
    """The errors of a log on one line."""
    texts = [line.text.strip() for line in lines if line.severity in {"ERROR", "INTERNAL_ERROR"}]
    return "; ".join(dict.fromkeys(texts)) or "TensorRT gave no reason"


def check_log(lines: list[LogLine]) -> None:
    """Refuse (EngineError) what TensorRT only warns of: a parser that drops an operator's input."""
    dropped = [line.text.strip() for line in lines if "unused input" in line.text.lower()]
    if dropped:
        raise EngineError(
            f"TensorRT drops part of the graph, the engine would be wrong: {'; '.join(dropped)}"
        )


@contextmanager
def interruptible() -> Iterator[Event]:
    """Set by Ctrl-C while TensorRT's own code runs, which Python cannot interrupt.

    Outside the main thread signals are left alone.
    """
    requested = Event()
    try:
        previous = signal.signal(signal.SIGINT, lambda number, frame: requested.set())
    except ValueError:  # not the main thread
        yield requested
        return
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous)


def make_monitor(trt: ModuleType, progress: Progress, cancelled: Event) -> Any:
    """A ``trt.IProgressMonitor``: a bar for the outermost phase, and an end to the build when asked for."""
    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # the binding insists on the call
            self._bars = ExitStack()
            self._outer = ""
            self._advance: Callable[[int], None] = lambda _: None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._bars.close()
                self._outer, self._advance = name, self._bars.enter_context(progress.count(name, steps))

        def step_complete(self, name: str, step: int) -> bool:
            if name == self._outer:
                self._advance(1)
            return not cancelled.is_set()

        def phase_finish(self, name: str) -> None:
            if name == self._outer:
                self._bars.close()

    return Monitor()


def _row_counts(widths: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if widths and min(widths) < 1:
        raise ValueError("a step has at least one row")
    return widths and tuple(sorted(set(widths)))


def _compiled(form: Form | None) -> Form | None:
    if form is Form.PREFIX:
        raise ValueError("TensorRT compiles modern and portable graphs, the CPU runs prefix ones")
    return form


def _said(targets: object) -> object:
    if isinstance(targets, str) and not targets.strip(" ,"):
        raise ValueError("expected GPUs such as sm86,sm89")
    return targets


def _gpus(targets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({name.lower() for name in targets}, key=lambda name: (len(name), name)))


@checked
class Request:
    """What to compile; ``tokens`` is the size of the token buffer.

    Each width is an optimization profile; they share one copy of the weights.
    """

    tokens: int = 0
    form: Annotated[Form | None, AfterValidator(_compiled)] = flag(
        "of the step graph: modern or portable, not prefix (default: what suits this TensorRT)", None
    )
    widths: Annotated[Numbers | None, AfterValidator(_row_counts)] = flag(
        "rows of a step, as 16,64 (default: the bundle's)", None
    )
    targets: Annotated[tuple[str, ...], NAMES, BeforeValidator(_said), AfterValidator(_gpus)] = flag(
        "build for other GPUs, as sm86,sm89 (TensorRT-RTX only)", ()
    )
    optimization_level: int | None = setting(
        "0 builds fast, 5 runs fast (default: TensorRT's own)", None, ge=0, le=5
    )

    @property
    def flags(self) -> tuple[str, ...]:
        """Options that change the engine."""
        level = self.optimization_level
        return () if level is None else (f"optimization_level={level}",)


@dataclass(frozen=True)
class Build:
    """A compiled engine with what the build said.

    Attributes:
        plan: the serialised engine, in TensorRT's own memory.
        layers: layers of the parsed network by TensorRT's type name.
        log: warnings and errors.
        timing_cache: measured kernels, to be written once the engine is.
    """

    plan: memoryview
    layers: Counter[str]
    log: tuple[LogLine, ...]
    timing_cache: bytes | None = None


@dataclass
class Builder:
    """Compiles with one TensorRT module."""

    trt: ModuleType
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.offered: Capabilities = capabilities(self.trt)

    def build(self, graph: Path, request: Request, timing_cache: bytes | None = None) -> Build:
        """Compile a step graph with its weights beside it, at the widths that are named.

        ``timing_cache``: kernels measured before, none yet where empty; None where TensorRT takes none.

        Raises:
            EngineError: TensorRT refuses the graph, drops part of it, or fails to build.
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        lines: list[LogLine] = []
        logger = make_logger(self.trt, lines)
        builder = self.trt.Builder(logger)
        strongly_typed = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(strongly_typed)
        parser = self.trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(graph)):
            reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            raise EngineError(f"{self.offered.name} cannot parse {graph}: {'; '.join(reasons)}")
        check_log(lines)
        layers = self._prepare_attention(network)
        config = builder.create_builder_config()
        self._configure(builder, network, config, request)
        if timing_cache is not None:
            config.set_timing_cache(config.create_timing_cache(timing_cache), ignore_mismatch=False)
        plan = self._run(builder, network, config, lines, graph)
        check_log(lines)
        kept = None if timing_cache is None else config.get_timing_cache()
        return Build(plan, layers, tuple(lines), None if kept is None else bytes(kept.serialize()))

    def _prepare_attention(self, network: Any) -> Counter[str]:
        """Attach the live length to every attention layer; count layers by type.

        Attention is fused for half precision only, so float32 attention may be split into its parts.
        """
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        counts = Counter(layer.type.name for layer in layers)
        if not counts["ATTENTION_INPUT"]:
            return counts
        live = None
        if self.offered.live_lengths:
            live = network.add_input(LIVE_INPUT, self.trt.int32, (1,))
        for layer in layers:
            if layer.type == self.trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = self.trt.IAttentionInputLayer  # the binding returns the base class
                layer.attention.decomposable = layer.get_input(0).dtype == self.trt.float32
                if live is not None:
                    layer.attention.key_value_lengths = live
        return counts

    def _configure(self, builder: Any, network: Any, config: Any, request: Request) -> None:
        for index, target in enumerate(request.targets):
            if index == 0:
                config.num_compute_capabilities = len(request.targets)
            config.set_compute_capability(getattr(self.trt.ComputeCapability, target.upper()), index)
        if request.optimization_level is not None:
            config.builder_optimization_level = request.optimization_level
        for width in request.widths or ():
            profile = builder.create_optimization_profile()
            for index in range(network.num_inputs):
                tensor = network.get_input(index)
                if DYNAMIC in tensor.shape:
                    size = request.tokens if tensor.name == "token_buffer" else width
                    shape = [size if length == DYNAMIC else length for length in tensor.shape]
                    profile.set_shape(tensor.name, shape, shape, shape)
            config.add_optimization_profile(profile)

    def _run(
        self, builder: Any, network: Any, config: Any, lines: Sequence[LogLine], graph: Path
    ) -> memoryview:
        with interruptible() as cancelled:
            config.progress_monitor = make_monitor(self.trt, self.progress, cancelled)
            plan = builder.build_serialized_network(network, config)
        if cancelled.is_set():
            raise KeyboardInterrupt
        if plan is None:
            raise EngineError(f"{self.offered.name} cannot build {graph}: {errors_of(list(lines))}")
        return memoryview(plan)


def build_bytes(weights: float) -> float:
    """Host memory at the peak of a build, for so many bytes of weights in the plan."""
    return BUILD_BASE_BYTES + BUILD_COPIES * weights


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one copy of a step graph's weights and of the K/V buffers, and weights' copies in the plan."""

    weights: int
    cache: int
    plan_copies: int

    @property
    def build(self) -> int:
        """Host memory at the peak of a build."""
        return int(build_bytes(self.plan_copies * self.weights))

    @property
    def run(self) -> int:
        """Device memory of a running engine, activations not counted."""
        return self.plan_copies * self.weights + self.cache


def estimate(bundle: Bundle, graph: StepGraph, widths: tuple[int, ...]) -> MemoryEstimate:
    """Memory for one step graph of a bundle, compiled for some widths."""
    cache = bundle.manifest.cache
    slots = 2 * cache.layers * cache.kv_heads * int(graph.capacity or 0)
    row_bytes = cache.head_size * bundle.manifest.cache_dtype(graph).itemsize
    return MemoryEstimate(
        graph.weights.bytes, slots * row_bytes, PLAN_COPIES if len(widths) > 1 and min(widths) == 1 else 1
    )


def check_memory(needed: MemoryEstimate, available: int | None) -> None:
    """Refuse (EngineError) a build that would be killed half way: less is available than the estimate."""
    host.check_memory(
        needed.build,
        available,
        f"building an engine of {needed.weights / 1e9:.1f} GB of weights",
        "close other programs, add swap, leave width 1 out of --widths, or use --force to try anyway",
        EngineError,
    )
