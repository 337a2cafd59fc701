"""What each optimisation of an engine is worth, turned on alone and together.

A diagonal step (k=1, serial) early in a context, each optimisation against the same step without it. On the
CPU: live-prefix attention and in-place K/V, each alone and together (prefix form); every other precision of
the bundle in a form that both have. On a GPU: every other precision, and CUDA graphs replayed against kernels
queued one by one, each the mean over a frame, since steps are queued. From the root:

    python -m benchmarks.ladder crafter-3m.diagd [--precision int8] [--backend cuda] [--window 4]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from benchmarks import parser
from diagd.bundle import Bundle, Form
from diagd.engines.backend import CHOICES, Backend, StepOptions, find, forms_of
from diagd.engines.engine import Engine, Steps
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import PrefixEngine
from diagd.engines.tensors import aligned_zeros
from diagd.errors import DiagdError
from diagd.profiling.measure import Measured, measure, random_workload
from diagd.runtime.decoders import ScheduledDecoder
from diagd.runtime.load import check_window, session_over, step_options, with_threads
from diagd.schedule import Schedule

REPEATS: Final = 2
SWITCHES: Final = "live-prefix attention and in-place K/V"


@dataclass(frozen=True)
class Row:
    """One row of the ladder: a step with an optimisation on, or why it was not measured.

    Attributes:
        seconds, before: of a step with it and without.
        reason: why there are no times.
        held: what both steps have in common.
    """

    name: str
    seconds: float | None = None
    before: float | None = None
    reason: str = ""
    held: str = ""

    @property
    def gain(self) -> float | None:
        """The step without over the step with."""
        return None if self.seconds is None or self.before is None else self.before / self.seconds


class SwitchedEngine(PrefixEngine):
    """The CPU engine with its optimisations as switches.

    With ``live_prefix`` the slots in use are bound, else all of them. Without ``in_place`` K/V go into
    another set of buffers, as with a cache that goes in and comes out of a graph.
    """

    def __init__(self, bundle: Bundle, options: StepOptions, *, live_prefix: bool, in_place: bool) -> None:
        super().__init__(bundle, options)
        self._live_prefix, self._in_place = live_prefix, in_place
        self._others = (
            {} if in_place else {n: aligned_zeros(b.shape, b.dtype) for n, b in self.buffers.items()}
        )
        self._other_values: dict[tuple[str, tuple[int, ...]], Any] = {}  # of the others

    @override
    def send(self, steps: Steps, parts: Sequence[int] | None = None, lane: int = 0) -> None:
        live = steps.live if self._live_prefix else np.full_like(steps.live, self.capacity)
        super().send(replace(steps, live=live), parts, lane)

    @override
    def step(self, lanes: Sequence[int] = (0,)) -> None:
        super().step(lanes)
        if not self._in_place:
            self.buffers, self._others = self._others, self.buffers
            self._values, self._other_values = self._other_values, self._values
            self._bound = 0

    def _bind_prefix(self, length: int) -> None:
        super()._bind_prefix(length)
        for name, buffer in self._others.items():
            self._bind_rows(f"present_{name}", buffer, (length, 1, *buffer.shape[1:]), output=True)


@dataclass(frozen=True)
class Ladder:
    """What is held fixed while one thing changes."""

    bundle: Bundle
    precision: str | None
    window: int
    cpu: CpuOptions
    backend: Backend

    @cached_property
    def chosen(self) -> Bundle:
        """The graphs of the precision."""
        return self.bundle.at_precision(self.precision)

    @property
    def on_processor(self) -> bool:
        """Whether steps are done when they return."""
        return not self.backend.describe()

    def rows(self) -> Iterator[Row]:
        """Measure one optimisation after the other."""
        others = [graph.precision for graph in self.bundle.manifest.graphs if graph.precision != self._name]
        if not others:
            yield Row("precision", reason=f"the bundle has {self._name} only; diagd-calibrate adds others")
        groups: dict[str, Callable[[], Iterable[Row]]] = {
            f"precision {name}": partial(self._precision, name) for name in dict.fromkeys(others)
        }
        if self.on_processor:
            groups = {SWITCHES: self._prefix, **groups}
        else:
            groups["CUDA graph"] = self._cuda_graph
        for name, measured in groups.items():
            try:
                yield from measured()
            except (DiagdError, OSError) as error:
                yield Row(name, reason=str(error))
        if self.on_processor:
            yield Row("CUDA graph", reason="needs a CUDA device: --backend cuda or tensorrt")

    @property
    def _name(self) -> str:
        return self.chosen.manifest.precisions[0]

    def _options(self, bundle: Bundle, form: Form | None = None) -> StepOptions:
        return step_options(bundle.manifest, self.window, cpu=self.cpu, form=form)

    def _prefix(self) -> Iterator[Row]:
        if Form.PREFIX not in forms_of(self.chosen):
            reason = "the bundle has no prefix graph of this precision; export with --form prefix"
            yield Row(SWITCHES, reason=reason)
            return
        switches = {
            "none": (False, False),
            "live-prefix attention": (True, False),
            "in-place K/V": (False, True),
            "both": (True, True),
        }
        before = None
        for name, (live_prefix, in_place) in switches.items():
            options = self._options(self.chosen)
            engine = SwitchedEngine(self.chosen, options, live_prefix=live_prefix, in_place=in_place)
            after = self._seconds(self.chosen, engine)
            before = before or after
            yield self._row(name, before, after, f"prefix form, {self._name}, engine alone")

    def _precision(self, name: str) -> Iterator[Row]:
        other = self.bundle.at_precision(name)
        if not self.on_processor:
            before, after = (self._mean_seconds(bundle) for bundle in (self.chosen, other))
            held = f"host and device together, against {self._name}"
            yield self._row(f"precision {name}", before, after, held)
            return
        shared = [form for form in forms_of(self.chosen) if form in forms_of(other)]
        if not shared:
            forms = ", ".join(form.value for form in forms_of(other))
            reason = f"no form in common with {self._name}: the bundle has it as {forms}"
            yield Row(f"precision {name}", reason=reason)
            return
        before, after = (
            self._seconds(bundle, self.backend.open_steps(bundle, self._options(bundle, shared[0])))
            for bundle in (self.chosen, other)
        )
        held = f"{shared[0].value} form, engine alone, against {self._name}"
        yield self._row(f"precision {name}", before, after, held)

    def _cuda_graph(self) -> Iterator[Row]:
        """Steps that replay graphs against steps that queue every kernel."""
        before, after = (self._mean_seconds(self.chosen, graphs=graphs) for graphs in (False, True))
        yield self._row("CUDA graph", before, after, f"{self._name}, host and device together")

    def _mean_seconds(self, bundle: Bundle, *, graphs: bool = True) -> float:
        """Mean of a step over a frame, whose tokens the host waits for: steps themselves are queued."""
        engine = self.backend.open_steps(bundle, replace(self._options(bundle), graphs=graphs))
        return self._best(bundle, engine, 2, lambda run, d: (run.decoded[1] - run.decoded[0]) / d)

    def _seconds(self, bundle: Bundle, engine: Engine) -> float:
        """Median of a step of the engine, the sampler apart."""

        def median(run: Measured, d: int) -> float:
            return float(np.median([step.engine for step in run.steps[run.chunks + 1 :]]))

        return self._best(bundle, engine, 1, median)

    def _best(
        self, bundle: Bundle, engine: Engine, frames: int, seconds: Callable[[Measured, int], float]
    ) -> float:
        """The better of a few runs, by what is said of one and of the steps between its frames."""
        schedule = Schedule.serial(bundle.manifest.layout, 1, bundle.manifest.schedule.row_seed)
        with session_over(bundle, engine, self.window, self.cpu) as session:
            workload = random_workload(session, 1, frames)
            runs = [measure(session, ScheduledDecoder(schedule), workload, frames) for _ in range(REPEATS)]
        return min(seconds(run, schedule.d) for run in runs)

    def _row(self, name: str, before: float, after: float, held: str) -> Row:
        place = f", {self.cpu.threads or 'all'} threads" if self.on_processor else ""
        return Row(name, after, before, held=f"{held}, k=1 serial, window {self.window}{place}")


def main() -> None:
    options = parser(__doc__, "bundle")
    options.add_argument("--precision", help="of the steps that are compared (default: the bundle's first)")
    options.add_argument("--backend", default="cpu", help=CHOICES)
    options.add_argument("--window", type=int, help="frames that a token may see (default: the context)")
    options.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for one a core")
    args = options.parse_args()
    bundle = Bundle.open(args.bundle)
    cpu = with_threads(CpuOptions(args.threads), bundle.at_precision(args.precision), args.backend)
    window = check_window(bundle.manifest, args.window)
    show(Console(width=120), list(Ladder(bundle, args.precision, window, cpu, find(args.backend)).rows()))


def show(console: Console, rows: list[Row]) -> None:
    """A table for everything that has the same things held fixed, then what was not measured."""
    for held in dict.fromkeys(row.held for row in rows if row.held):
        table = Table("optimisation", "ms without", "ms with", "gain", title=f"a step: {held}")
        for row in rows:
            if row.held == held and row.seconds is not None and row.before is not None:
                times = (f"{1e3 * row.before:.3f}", f"{1e3 * row.seconds:.3f}", f"{row.gain:.2f} x")
                table.add_row(row.name, *times)
        console.print(table)
    for row in rows:
        if row.seconds is None:
            console.print(f"{row.name}: {row.reason}")


if __name__ == "__main__":
    main()
