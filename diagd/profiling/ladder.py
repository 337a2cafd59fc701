"""What each optimisation of an engine is worth, turned on alone and together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Final, NamedTuple

import numpy as np

from diagd.bundle import Bundle, Form
from diagd.engines.buffers import aligned_zeros
from diagd.engines.cuda.engine import DeviceEngine
from diagd.engines.engine import Engine, Float, SamplingState, StepInputs
from diagd.engines.modern import ModernEngine
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import MAX_WIDTH, PrefixEngine
from diagd.errors import DiagdError
from diagd.profiling.engines import forms_of, open_engine, session_over
from diagd.profiling.host_sampling import HostSamplingEngine, without_sampler
from diagd.profiling.measure import measure, random_workload
from diagd.profiling.report import Rung
from diagd.profiling.targets import DeviceTarget
from diagd.runtime.session import token_places
from diagd.schedule import Schedule, slots_needed

REPEATS: Final = 2
SWITCHES: Final = "live-prefix attention and in-place K/V"


class SwitchedEngine(PrefixEngine):
    """The CPU engine with its optimisations as switches.

    Args:
        bundle: with a graph in the prefix form.
        capacity: slots.
        tokens: places of the token buffer.
        options: of ONNX Runtime.
        live_prefix: bind the slots in use; otherwise all of them.
        in_place: write K/V where they lie; otherwise into another set of buffers, as a cache that goes in
            and comes out of a graph does.
    """

    def __init__(
        self,
        bundle: Bundle,
        capacity: int,
        tokens: int,
        options: CpuOptions,
        *,
        live_prefix: bool,
        in_place: bool,
    ) -> None:
        super().__init__(bundle, capacity, tokens, options)
        self._live_prefix, self._in_place = live_prefix, in_place
        self._others = (
            {} if in_place else {n: aligned_zeros(b.shape, b.dtype) for n, b in self.buffers.items()}
        )

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """Run one pass; see ``Engine.step``."""
        if not self._live_prefix:
            inputs = replace(inputs, live=self.capacity)
        logits = super().step(inputs, sampling)
        if not self._in_place:
            self.buffers, self._others = self._others, self.buffers
            self._bound = 0
        return logits

    def _bind_prefix(self, length: int) -> None:
        super()._bind_prefix(length)
        for name, buffer in self._others.items():
            self._bind_output(f"present_{name}", buffer[:length])


class _Group(NamedTuple):
    """Rungs that share their measurements, and how many runs of one frame those are."""

    name: str
    runs: int
    measure: Callable[[], Iterable[Rung]]


@dataclass(frozen=True)
class Ladder:
    """What is held fixed while one thing changes: a diagonal step (k=1, serial) early in a context.

    Attributes:
        bundle: with the graphs of every precision.
        precision: of the steps that are compared; default: that of the first graph.
        window: frames a token may see.
        cpu: threads and cache.
        device: where the steps run; None: on the processor.
    """

    bundle: Bundle
    precision: str | None
    window: int
    cpu: CpuOptions
    device: DeviceTarget | None = None

    @cached_property
    def chosen(self) -> Bundle:
        """The graphs of the precision."""
        return self.bundle.at_precision(self.precision)

    @property
    def runs(self) -> int:
        """Runs of one frame that all rungs come to."""
        return sum(group.runs for group in self._groups())

    def rungs(self, left: Callable[[int], bool] = lambda _: True) -> Iterator[Rung]:
        """Measure one optimisation after the other.

        Args:
            left: whether there is time for so many runs of one frame; rungs without are named all the same.
        """
        if not self._others():
            yield _unmeasured("precision", f"the bundle has {self._name} only; diagd-calibrate adds others")
        for group in self._groups():
            if not left(group.runs):
                yield _unmeasured(group.name, "left out: the time budget does not allow it")
                continue
            try:
                yield from group.measure()
            except (DiagdError, OSError) as error:
                yield _unmeasured(group.name, str(error))
        if not self.device:
            yield _unmeasured("CUDA graph", "needs a CUDA device: --set backend=cuda or tensorrt")

    def _groups(self) -> list[_Group]:
        """Rungs that are measured together."""
        forms, twice = forms_of(self.chosen), 2 * REPEATS
        precisions = [
            _Group(f"precision {name}", twice, partial(self._precision, name)) for name in self._others()
        ]
        if self.device:
            return [*precisions, _Group("CUDA graph", twice, partial(self._cuda_graph, self.device))]
        switches = _Group(SWITCHES, 2 * twice * (Form.PREFIX in forms), self._prefix)
        sampling = _Group("sampling in the graph", twice * (Form.MODERN in forms), self._sampling)
        return [switches, sampling, *precisions]

    @property
    def _name(self) -> str:
        return self.chosen.manifest.graphs[0].precision

    def _prefix(self) -> Iterator[Rung]:
        if Form.PREFIX not in forms_of(self.chosen):
            reason = "the bundle has no prefix graph of this precision; export with --form prefix"
            yield _unmeasured(SWITCHES, reason)
            return
        switches = {
            "none": (False, False),
            "live-prefix attention": (True, False),
            "in-place K/V": (False, True),
            "both": (True, True),
        }
        layout = self.chosen.manifest.layout
        slots, places = slots_needed(layout, self.window, MAX_WIDTH), token_places(layout, self.window).size
        before = None
        for name, (live_prefix, in_place) in switches.items():
            engine = SwitchedEngine(
                self.chosen, slots, places, self.cpu, live_prefix=live_prefix, in_place=in_place
            )
            after = self._seconds(self.chosen, engine)
            before = before or after
            yield self._rung(name, before, after, f"prefix form, {self._name}, engine alone")

    def _sampling(self) -> Iterator[Rung]:
        name = "sampling in the graph"
        if Form.MODERN not in forms_of(self.chosen):
            yield _unmeasured(name, "the bundle has no modern graph; export with --form prefix,modern")
            return
        if find_spec("onnx") is None:
            yield _unmeasured(name, "needs the onnx package: pip install 'diagd[export]'")
            return
        places = token_places(self.chosen.manifest.layout, self.window).size
        with without_sampler(self.chosen) as bare:
            # A packed copy would outlive the graph that it was made for.
            options = replace(self.cpu, prepack=False)
            before = self._seconds(bare, HostSamplingEngine(bare, places, options), sampling=True)
        after = self._seconds(self.chosen, ModernEngine(self.chosen, places, options), sampling=True)
        yield self._rung(name, before, after, f"modern form, {self._name}, engine and sampling")

    def _others(self) -> list[str]:
        names = dict.fromkeys(graph.precision for graph in self.bundle.manifest.graphs)
        return [name for name in names if name != self._name]

    def _precision(self, name: str) -> Iterator[Rung]:
        other = self.bundle.at_precision(name)
        if self.device:
            before, after = (self._mean_seconds(self.device, bundle) for bundle in (self.chosen, other))
            held = f"host and device together, against {self._name}"
            yield self._rung(f"precision {name}", before, after, held)
            return
        shared = [form for form in forms_of(self.chosen) if form in forms_of(other)]
        if not shared:
            forms = ", ".join(form.value for form in forms_of(other))
            reason = f"no form in common with {self._name}: the bundle has it as {forms}"
            yield _unmeasured(f"precision {name}", reason)
            return
        before, after = (
            self._seconds(bundle, open_engine(bundle, shared[0], self.window, self.cpu))
            for bundle in (self.chosen, other)
        )
        held = f"{shared[0].value} form, engine alone, against {self._name}"
        yield self._rung(f"precision {name}", before, after, held)

    def _cuda_graph(self, device: DeviceTarget) -> Iterator[Rung]:
        """Steps that replay graphs against steps that queue every kernel."""
        before, after = (self._mean_seconds(device, self.chosen, graphs=graphs) for graphs in (False, True))
        yield self._rung("CUDA graph", before, after, f"{self._name}, host and device together")

    def _mean_seconds(self, device: DeviceTarget, bundle: Bundle, *, graphs: bool = True) -> float:
        """Mean of a step over a frame, whose tokens the host waits for: steps themselves are queued."""
        session, manifest = device.open(bundle, self.window, graphs=graphs), bundle.manifest
        schedule = Schedule.serial(manifest.layout, 1, manifest.schedule.row_seed)
        workload, best = random_workload(session, 1, 2), float("inf")
        try:
            for _ in range(REPEATS):
                run = measure(session, schedule, workload, 2)
                best = min(best, (run.decoded[1] - run.decoded[0]) / schedule.d)
        finally:
            if isinstance(session.engine, DeviceEngine):
                session.engine.close()
        return best

    def _seconds(self, bundle: Bundle, engine: Engine, *, sampling: bool = False) -> float:
        """Median of a step of the engine, its sampler included or not; the better of a few runs."""
        session, manifest = session_over(bundle, engine, self.window, self.cpu), bundle.manifest
        schedule = Schedule.serial(manifest.layout, 1, manifest.schedule.row_seed)
        workload, best = random_workload(session, 1, 1), float("inf")
        for _ in range(REPEATS):
            run = measure(session, schedule, workload, 1)
            steps = run.steps[run.chunks + 1 :]
            times = [step.engine + (step.sampling if sampling else 0.0) for step in steps]
            best = min(best, float(np.median(times)))
        return best

    def _rung(self, name: str, before: float, after: float, held: str) -> Rung:
        place = "" if self.device else f", {self.cpu.threads or 'all'} threads"
        fixed = f"{held}, k=1 serial, window {self.window}{place}"
        return Rung(name=name, seconds=after, gain=before / after, before=before, held=fixed)


def _unmeasured(name: str, reason: str) -> Rung:
    return Rung(name=name, seconds=None, gain=None, reason=reason)
