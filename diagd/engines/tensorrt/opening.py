"""From a bundle to a compiled engine on disk, and from there to an engine that runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pydantic.dataclasses
from pydantic import AfterValidator, BeforeValidator

from diagd.bundle import Bundle, Form, cache
from diagd.bundle.manifest import StepGraph
from diagd.engines.backend import StepOptions, graphs_of, widths_of
from diagd.engines.devices.cuda import CudaDevice, DeviceDescription, describe_device, open_driver
from diagd.engines.executor import Executor
from diagd.engines.fingerprint import ANY, EngineStore, Fingerprint, StoredEngine, graph_digest
from diagd.engines.host import available_bytes
from diagd.engines.tensorrt import (
    Capabilities,
    capabilities,
    check_targets,
    import_tensorrt,
)
from diagd.engines.tensorrt.builder import (
    Builder,
    BuildOptions,
    LogLine,
    check_memory,
    errors_of,
    estimate,
    make_logger,
)
from diagd.engines.tensors import Tensor
from diagd.errors import DiagdError, EngineError
from diagd.options import NAMES, OPTIONS, Numbers, flag, setting
from diagd.progress import Progress
from diagd.version import __version__


def _row_counts(widths: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if widths and min(widths) < 1:
        raise ValueError("a step has at least one row")
    return widths and tuple(sorted(set(widths)))


def _said(targets: object) -> object:
    if isinstance(targets, str) and not targets.strip(" ,"):
        raise ValueError("expected GPUs such as sm86,sm89")
    return targets


def _gpus(targets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({name.lower() for name in targets}, key=lambda name: (len(name), name)))


@pydantic.dataclasses.dataclass(frozen=True, config=OPTIONS)
class Request:
    """What to compile of a bundle; ``tokens`` is the size of the token buffer."""

    tokens: int = 0
    form: Form | None = flag(
        "of the step graph: modern or portable (default: what suits this TensorRT)", None
    )
    widths: Annotated[Numbers | None, AfterValidator(_row_counts)] = flag(
        "rows of a step, as 16,64 (default: the bundle's)", None
    )
    targets: Annotated[tuple[str, ...], NAMES, BeforeValidator(_said), AfterValidator(_gpus)] = flag(
        "build for other GPUs, as sm86,sm89 (TensorRT-RTX only)", (), name="target"
    )
    optimization_level: int | None = setting(
        "0 builds fast, 5 runs fast (default: TensorRT's own)", None, ge=0, le=5
    )

    @property
    def flags(self) -> tuple[str, ...]:
        """Options that change the engine."""
        level = self.optimization_level
        return () if level is None else (f"optimization_level={level}",)


def resolve(bundle: Bundle, request: Request, offered: Capabilities) -> tuple[Fingerprint, StepGraph]:
    """Settle every choice a request leaves open: what an engine is compiled for, and of which step graph.

    Raises:
        BundleError: the bundle has no graph of the form.
        EngineError: a target cannot be built for, or there is no GPU and no target is named.
    """
    form, graph, widths = choose(bundle, request, offered)
    here = _described(offered, request.targets)
    fingerprint = Fingerprint(
        graph=graph_digest(bundle, graph),
        runtime=offered.name,
        device=here.name,
        targets=request.targets or (here.target,),
        driver=here.driver,
        form=form,
        precision=graph.precision,
        widths=widths,
        tokens=request.tokens,
        flags=request.flags,
    )
    return fingerprint, graph


def choose(
    bundle: Bundle, request: Request, offered: Capabilities
) -> tuple[Form, StepGraph, tuple[int, ...]]:
    """Form, step graph and widths of a request, where no GPU is needed to tell.

    Raises:
        BundleError: the bundle has no graph of the form.
        EngineError: a target cannot be built for, or a width is beyond the graph's.
    """
    check_targets(offered, request.targets)
    form = request.form or usable_forms(bundle, offered)[0]
    graphs = graphs_of(bundle, form)
    widest = int(graphs[-1].width or 0)
    if request.widths and request.widths[-1] > widest:
        raise EngineError(
            f"width {request.widths[-1]} is above {widest}, for which {bundle.path} has slots; export it "
            f"again with --set widths={','.join(map(str, request.widths))}"
        )
    return form, graphs[0], request.widths or widths_of(graphs)


def usable_forms(bundle: Bundle, offered: Capabilities) -> tuple[Form, ...]:
    """The forms of a bundle that a TensorRT takes, best first; every one takes the portable form.

    Where the bundle has none of them, the one that it should have.
    """
    forms = {graph.form for graph in bundle.manifest.graphs}
    wanted = dict.fromkeys((offered.form, Form.PORTABLE))
    return tuple(form for form in wanted if form in forms) or (offered.form,)


def compile_engine(
    bundle: Bundle,
    request: Request,
    trt: ModuleType,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> tuple[StoredEngine, tuple[LogLine, ...]]:
    """Compile a step graph and keep the engine in the bundle.

    With ``force`` even if memory seems too small.

    Returns:
        The engine on disk, read back, and what TensorRT warned of.

    Raises:
        EngineError: TensorRT refuses, memory does not suffice, or what is on disk is not what was built.
        KeyboardInterrupt: cancelled; nothing is left.
    """
    offered = capabilities(trt)
    chosen, graph = resolve(bundle, request, offered)
    if not force:
        check_memory(estimate(bundle, graph, chosen.widths), available_bytes())
    known = (cache.read("timing", timing_key(chosen)) or b"") if offered.timing_cache else None
    options = BuildOptions(chosen.widths, chosen.tokens, request.targets, request.optimization_level, known)
    build = Builder(trt, progress or Progress()).build(bundle.file(graph.file), options)
    stored = EngineStore(bundle).write(chosen, build.plan, __version__)
    if build.timing_cache is not None:
        cache.write("timing", timing_key(chosen), build.timing_cache)
    return stored, build.log


def open_tensorrt(
    bundle: Bundle, options: StepOptions, device: CudaDevice, *, runtime: str | None = None
) -> Executor:
    """The engine of this machine, ready to run; ``runtime`` None takes the first TensorRT that is installed.

    The token buffer has the size for which it was compiled.

    Raises:
        EngineError: no engine fits; the message names what differs and the line that mends it.
    """
    trt = import_tensorrt(runtime)
    offered = capabilities(trt)
    graphs, wanted = dict[Form, StepGraph](), list[Fingerprint]()
    for form in usable_forms(bundle, offered):
        fingerprint, graphs[form] = resolve(bundle, Request(options.tokens, form), offered)
        wanted.append(fingerprint.model_copy(update={"widths": ()}))
    stored = EngineStore(bundle).find(*wanted)
    built = stored.record.fingerprint

    def bind(tensors: Mapping[str, Tensor]) -> TensorRTProgram:
        return TensorRTProgram(trt, stored.plan, built.widths, tensors, device.stream)

    return Executor(bundle.manifest, graphs[built.form], built.widths, options, device, bind)


def timing_key(fingerprint: Fingerprint) -> str:
    """Under which kernels measured on one device with one TensorRT and one driver are kept."""
    name = "-".join((fingerprint.runtime, fingerprint.device, fingerprint.driver)).replace(" ", "_")
    return name.replace("/", "_")


def _described(offered: Capabilities, targets: tuple[str, ...]) -> DeviceDescription:
    """The GPU an engine is for: a family of them when cross-building."""
    if targets:
        return DeviceDescription(ANY, "", ANY)
    try:
        return describe_device(open_driver())
    except DiagdError as error:
        remedy = (
            f"name GPUs to build for with --target (this TensorRT offers {', '.join(offered.cross_targets)})"
            if offered.cross_targets
            else "run diagd-build on the machine with the GPU"
        )
        raise EngineError(f"{error}; {remedy}") from error


class TensorRTProgram:
    """One execution context a width, over one engine and one copy of its weights; see ``Program``.

    ``widths`` are those of the plan's optimization profiles, in their order.
    """

    capturable = True

    def __init__(
        self,
        trt: ModuleType,
        plan: Path,
        widths: tuple[int, ...],
        tensors: Mapping[str, Tensor],
        stream: int,
    ) -> None:
        self._lines: list[LogLine] = []
        self._logger = make_logger(trt, self._lines)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise EngineError(f"{plan} cannot be loaded: {errors_of(self._lines)}; run diagd-build again")
        self._trt, self._stream = trt, stream
        self._check_aliases(tensors)
        self._contexts = {
            width: self._context(profile, width, tensors) for profile, width in enumerate(widths)
        }

    def enqueue(self, width: int) -> None:
        """Queue one step of ``width`` rows."""
        if not self._contexts[width].execute_async_v3(self._stream):
            raise EngineError(f"TensorRT cannot run a step of width {width}: {errors_of(self._lines)}")

    def _context(self, profile: int, width: int, tensors: Mapping[str, Tensor]) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineError(f"no memory for an execution context: {errors_of(self._lines)}")
        context.set_optimization_profile_async(profile, self._stream)
        for name in self._names():
            if name not in tensors:
                raise EngineError(f"the engine has a tensor '{name}' that diagd does not know; rebuild it")
            if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                context.set_input_shape(name, tensors[name].at_width(width))
            context.set_tensor_address(name, tensors[name].address)
        return context

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def _check_aliases(self, tensors: Mapping[str, Tensor]) -> None:
        """Every output that an engine writes in place must lie where its input lies."""
        if not hasattr(self._engine, "get_aliased_input_tensor"):
            return
        for name in self._names():
            source = self._engine.get_aliased_input_tensor(name)
            if source and tensors[name].address != tensors[source].address:
                raise EngineError(f"the engine writes '{name}' into '{source}', which has another address")
