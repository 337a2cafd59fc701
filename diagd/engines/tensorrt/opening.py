"""From a bundle to a compiled engine on disk, and from there to an engine that runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from diagd.bundle import Bundle, Form, cache
from diagd.bundle.actions import Record
from diagd.bundle.files import atomic_directory, sha256
from diagd.bundle.lock import turn
from diagd.bundle.manifest import StepGraph
from diagd.bundle.targets import folder_target
from diagd.engines.backend import StepOptions, graphs_of, widths_of
from diagd.engines.devices.cuda import CudaDevice, DeviceDescription, describe_device, open_driver
from diagd.engines.executor import Executor
from diagd.engines.host import available_bytes
from diagd.engines.tensorrt import Capabilities, capabilities, check_targets, import_tensorrt
from diagd.engines.tensorrt.builder import (
    Builder,
    LogLine,
    Request,
    check_memory,
    errors_of,
    estimate,
    make_logger,
)
from diagd.engines.tensors import Tensor, check_shapes
from diagd.errors import DiagdError, EngineError, command_line
from diagd.progress import Progress
from diagd.version import __version__

RECORD_NAME = "engine.json"
PLAN_NAME = "step.plan"
ANY = "any"
"""Device or driver of an engine that was built for a family of GPUs rather than on one."""


class Fingerprint(Record):
    """Everything that must be the same where an engine is built and where it runs.

    Attributes:
        graph: digest of the ONNX file and its weights.
        runtime: TensorRT flavour and version.
        device: name of the GPU, or ``any``.
        targets: compute capabilities the engine runs on, as ``sm89``.
        driver: version, or ``any``.
        form, precision, widths, tokens: of the step graph and its buffers; no widths: any.
        flags: options of the build that change the engine; none: any.
    """

    graph: str
    runtime: str
    device: str
    targets: tuple[str, ...]
    driver: str
    form: Form
    precision: str
    widths: tuple[int, ...]
    tokens: Annotated[int, Field(ge=1)]
    flags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of the engine's directory."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def differences(self, here: Fingerprint) -> list[str]:
        """Parts in which an engine does not fit a machine, as ``part: built with X, here Y``."""
        return [
            f"{name}: built for {_text(getattr(self, name))}, here {_text(getattr(here, name))}"
            for name in type(self).model_fields
            if not self._fits(here, name)
        ]

    def _fits(self, here: Fingerprint, name: str) -> bool:
        built, wanted = getattr(self, name), getattr(here, name)
        if name in {"device", "driver"} and built == ANY:
            return True
        if name in {"widths", "flags"} and not wanted:
            return True
        if name == "targets":
            return set(wanted) <= set(built)
        return bool(built == wanted)


class EngineRecord(Record):
    """What ``engine.json`` says of the plan beside it."""

    fingerprint: Fingerprint
    bytes: int
    sha256: str
    diagd_version: str


@dataclass(frozen=True)
class StoredEngine:
    """A compiled engine on disk."""

    directory: Path
    record: EngineRecord

    @property
    def plan(self) -> Path:
        """File of the serialised engine."""
        return self.directory / PLAN_NAME


class EngineStore:
    """Compiled engines of a bundle: ``engines/<key>/`` inside it."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.root = bundle, bundle.path / "engines"

    def write(self, fingerprint: Fingerprint, plan: bytes | memoryview) -> StoredEngine:
        """Keep an engine, whole or not at all; EngineError where what is on disk is not what was built."""
        digest = hashlib.sha256(plan).hexdigest()
        record = EngineRecord(
            fingerprint=fingerprint, bytes=len(plan), sha256=digest, diagd_version=__version__
        )
        directory = self.root / fingerprint.key
        with (
            turn(self.bundle.path.resolve()),
            atomic_directory(directory, (PLAN_NAME, RECORD_NAME)) as partial,
        ):
            (partial / PLAN_NAME).write_bytes(plan)
            (partial / RECORD_NAME).write_text(
                record.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n"
            )
        stored = StoredEngine(directory, record)
        check_plan(stored)
        return stored

    def __iter__(self) -> Iterator[StoredEngine]:
        """Engines whose record can be read."""
        for file in sorted(self.root.glob(f"*/{RECORD_NAME}")):
            try:
                yield StoredEngine(file.parent, EngineRecord.model_validate_json(file.read_bytes()))
            except (ValidationError, OSError):
                continue  # of another diagd: as good as absent

    def find(self, here: Fingerprint, *others: Fingerprint) -> StoredEngine:
        """The engine that fits this machine and graph; ``others`` are further choices that would do.

        Raises:
            EngineError: there is none, or it is damaged; the message names what differs and the line that
                builds the right one.
        """
        stored = [
            (engine, min((engine.record.fingerprint.differences(f) for f in (here, *others)), key=len))
            for engine in self
        ]
        if not stored:
            raise EngineError(f"{self.bundle.path} has no compiled engine; run: {self.build_line(here)}")
        engine, differences = min(stored, key=lambda pair: len(pair[1]))
        if differences:
            raise EngineError(
                f"no compiled engine of {self.bundle.path} fits; the nearest differs in "
                f"{'; '.join(differences)}. Run: {self.build_line(here)}"
            )
        check_plan(engine)
        return engine

    def build_line(self, here: Fingerprint) -> str:
        """The command that builds the engine which would fit."""
        line = command_line("diagd-build", str(self.bundle.path), "--precision", here.precision)
        line += f" --form {here.form.value} --runtime {here.runtime.split()[0]}"
        if here.widths:
            line += f" --widths {','.join(map(str, here.widths))}"
        return "".join([line, *(f" --set {flag}" for flag in here.flags)])


def check_plan(engine: StoredEngine) -> None:
    """Compare a plan with its record; EngineError where it is truncated or altered."""
    record, plan = engine.record, engine.plan
    size = plan.stat().st_size if plan.is_file() else 0
    if size != record.bytes or sha256(plan) != record.sha256:
        raise EngineError(
            f"{plan} is damaged: {size} bytes, its record says {record.bytes} with sha256 "
            f"{record.sha256[:12]}; delete {engine.directory} and run diagd-build again"
        )


def _text(value: object) -> str:
    if isinstance(value, Form):
        return value.value
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    text = str(value)
    return text[:12] if len(text) == hashlib.sha256().digest_size * 2 else text


def resolve(bundle: Bundle, request: Request, offered: Capabilities) -> tuple[Fingerprint, StepGraph]:
    """Settle every choice a request leaves open: what an engine is compiled for, and of which step graph.

    Raises:
        BundleError: the bundle has no graph of the form.
        EngineError: a target cannot be built for, or there is no GPU and no target is named.
    """
    graph, widths = choose(bundle, request, offered)
    here = _described(offered, request.targets)
    fingerprint = Fingerprint(
        graph=bundle.graph_digest(graph),
        runtime=offered.name,
        device=here.name,
        targets=request.targets or (here.target,),
        driver=here.driver,
        form=graph.form,
        precision=graph.precision,
        widths=widths,
        tokens=request.tokens,
        flags=request.flags,
    )
    return fingerprint, graph


def choose(bundle: Bundle, request: Request, offered: Capabilities) -> tuple[StepGraph, tuple[int, ...]]:
    """Step graph and widths of a request, where no GPU is needed to tell.

    Raises:
        BundleError: the bundle has no graph of the form.
        EngineError: a target cannot be built for, or a width is beyond the graph's.
    """
    check_targets(offered, request.targets)
    graphs = graphs_of(bundle, request.form or usable_forms(bundle, offered)[0])
    widest = int(graphs[-1].width or 0)
    if request.widths and request.widths[-1] > widest:
        raise EngineError(
            f"width {request.widths[-1]} is above {widest}, for which {bundle.path} has slots; export it "
            f"again with --set widths={','.join(map(str, request.widths))}"
        )
    return graphs[0], request.widths or widths_of(graphs)


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
    """Compile a step graph and keep the engine in the bundle; with ``force`` even if memory seems too small.

    Gives the engine on disk, read back, and what TensorRT warned of. Ctrl-C leaves nothing behind.

    Raises:
        BundleError: another bundle took the place of this one meanwhile, or none is there any more.
        EngineError: TensorRT refuses, memory does not suffice, or what is on disk is not what was built.
        UsageError: the bundle's folder cannot be written to.
    """
    offered, store = capabilities(trt), EngineStore(bundle)
    chosen, graph = resolve(bundle, request, offered)
    folder_target(store.root / chosen.key, {PLAN_NAME: b""}, "an engine", "bundle")
    if not force:
        check_memory(estimate(bundle, graph, chosen.widths), available_bytes())
    known = (cache.read("timing", timing_key(chosen)) or b"") if offered.timing_cache else None
    asked = replace(request, widths=chosen.widths)
    build = Builder(trt, progress or Progress()).build(bundle.file(graph.file), asked, known)
    bundle.check_unchanged(graph.file, *graph.weights.files)
    stored = store.write(chosen, build.plan)
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
            f"name GPUs to build for with --targets (this TensorRT offers {', '.join(offered.cross_targets)})"
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
        self, trt: ModuleType, plan: Path, widths: tuple[int, ...], tensors: Mapping[str, Tensor], stream: int
    ) -> None:
        self._lines: list[LogLine] = []
        self._logger = make_logger(trt, self._lines)
        self._runtime = trt.Runtime(self._logger)
        # mapped: the device's memory is the host's on a Jetson, where a copy would take it twice
        self._engine = self._runtime.deserialize_cuda_engine(np.memmap(plan, mode="r"))
        if self._engine is None:
            raise EngineError(f"{plan} cannot be loaded: {errors_of(self._lines)}; run diagd-build again")
        self._trt, self._stream = trt, stream
        self._check_aliases(tensors)
        there = {name: tuple(self._engine.get_tensor_shape(name)) for name in self._names()}
        check_shapes(
            there, filter(self._is_input, there), {name: tensor.shape for name, tensor in tensors.items()}
        )
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
            if self._is_input(name):
                context.set_input_shape(name, tensors[name].at_width(width))
            context.set_tensor_address(name, tensors[name].address)
        return context

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def _check_aliases(self, tensors: Mapping[str, Tensor]) -> None:
        """Every output that an engine writes in place must lie where its input lies."""
        if not capabilities(self._trt).reports_aliases:
            return
        for name in self._names():
            source = self._engine.get_aliased_input_tensor(name)
            if source and tensors[name].address != tensors[source].address:
                raise EngineError(f"the engine writes '{name}' into '{source}', which has another address")
