"""An engine against a plain reference, on one run, cell by cell.

The reference is the FP32 ``prefix`` graph on ONNX Runtime's CPU provider with everything off that could go
wrong: no graph optimisation, no packed weights, no cache in place, no live prefix, one thread. It is fed the
tokens that the engine chose, so every cell is compared on the same inputs, and the two decode alike exactly
if they agree at every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, Form
from diagd.engines.backend import Backend, find, forms_of, graphs_of, names
from diagd.engines.engine import Int
from diagd.engines.executor import Executor
from diagd.engines.onnxruntime_session import CpuOptions, open_plainly
from diagd.engines.processor import ReferenceEngine, open_fixed
from diagd.errors import UsageError, unknown
from diagd.profiling.measure import Workload, random_workload
from diagd.runtime.comparison import Comparison, audit, lockstep, redrawn
from diagd.runtime.decoders import Decoder, ForcedDecoder, JacobiDecoder, ScheduledDecoder
from diagd.runtime.load import check_window, open_session, session_over, step_options
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.slots import TokenPlaces
from diagd.schedule import NO_SINK, Schedule, slots_needed


@dataclass(frozen=True)
class Tolerance:
    """What an engine must reach.

    ``agreement`` is the least share of cells with the reference's token, ``error`` the greatest relative
    error of the logits, ``tie`` how far behind, as a share of the greatest logit, another token still agrees.
    """

    agreement: float
    error: float
    tie: float


TOLERANCES: Final = {
    "fp32": Tolerance(1.0, 1e-3, 1e-4),
    "fp16": Tolerance(0.98, 2e-2, 1e-3),
    "bf16": Tolerance(0.95, 5e-2, 1e-2),
}
QUANTISED: Final = Tolerance(0.90, 0.2, 0.0)


def tolerance_of(precision: str) -> Tolerance:
    """What a step graph of a precision must reach."""
    return TOLERANCES.get(precision, QUANTISED)


@dataclass(frozen=True)
class Difference:
    """The first cell with another token than the reference's; ``margin`` is how far that one was ahead."""

    frame: int
    row: int
    column: int
    token: int
    expected: int
    margin: float


@dataclass(frozen=True)
class Verdict:
    """One decoding order.

    ``agreement`` is the share of cells with the reference's token, near ties included; ``error`` is the
    Euclidean norm of all logits' differences over that of the reference's, ``worst`` the greatest difference
    of a logit over the greatest logit.
    """

    engine: str
    order: str
    cells: int
    identical: bool
    agreement: float
    error: float
    worst: float
    first_difference: Difference | None
    passed: bool


def open_reference(bundle: Bundle, session: Session) -> Session:
    """A session over the reference that runs the steps of another session.

    The bundle has the FP32 ``prefix`` graph of the same model.

    Raises:
        BundleError: the bundle has no such graph.
    """
    layout, width = session.layout, session.engine.max_width
    places = TokenPlaces(layout, bundle.manifest.context.frames).size
    engine = ReferenceEngine(bundle, slots_needed(layout, session.window, width), places, width)
    return session_over(bundle, engine, session.window, CpuOptions(threads=1, prepack=False))


def verify(
    session: Session,
    reference: Session,
    name: str,
    precision: str,
    schedule: Schedule,
    workload: Workload,
    frames: int,
) -> Verdict:
    """Decode greedily and compare every cell.

    The reference follows step by step; the precision of the engine's graph chooses the tolerance.
    """
    greedy = SamplingSettings(0.0)
    actions, _ = (workload.start(one, frames) for one in (session, reference))
    steps = session.steps(ScheduledDecoder(schedule), actions, count=frames, sampling=greedy)
    follows = reference.steps(ForcedDecoder(schedule), actions, count=frames, sampling=greedy)
    layout = schedule.layout
    comparison = Comparison(session.manifest.sampling.range_table(layout), layout.prefix)
    for step, cells, seen, expected in lockstep(steps, follows, reference.stream):
        comparison.add(step.width, cells, expected.logits, seen.logits, seen.tokens)
    return _verdict(name, schedule, len(workload.prompt), tolerance_of(precision), comparison)


def _verdict(
    name: str, schedule: Schedule, known: int, tolerance: Tolerance, comparison: Comparison
) -> Verdict:
    layout, difference = schedule.layout, None
    first = next((cell for cell in comparison.cells if cell.token != cell.expected), None)
    if first is not None:  # its frame is counted from the first that was decoded
        frame, place = divmod(first.position - layout.first_cell(known), layout.frame_length)
        difference = Difference(
            *(frame, *divmod(place, layout.columns)), first.token, first.expected, first.margin
        )
    agreement, error = comparison.agreement(tolerance.tie), comparison.error
    return Verdict(
        engine=name,
        order=schedule.name,
        cells=len(comparison.cells),
        identical=first is None,
        agreement=agreement,
        error=error,
        worst=comparison.worst,
        first_difference=difference,
        passed=agreement >= tolerance.agreement and error <= tolerance.error,
    )


@dataclass(frozen=True)
class Candidate:
    """An engine over the graphs of one precision.

    ``precision`` is that in which the engine computes.
    """

    name: str
    bundle: Bundle
    session: Session
    cpu: CpuOptions
    precision: str

    def tensors(self) -> list[TensorVerdict]:
        """Every output of one step; none for the prefix form, which only ONNX Runtime's processor runs."""
        engine, window = self.session.engine, self.session.window
        if engine.form is Form.PREFIX:
            return []
        options = step_options(self.bundle.manifest, window, cpu=self.cpu)
        with closing(open_fixed(self.bundle, engine.form, options)) as source:
            plain = session_over(self.bundle, source, window, self.cpu)
            feeds = capture_feeds(plain, source, engine.padded_widths)
        expected = plain_outputs(self.bundle.file(graphs_of(self.bundle, engine.form)[0].file), feeds)
        found = engine.evaluate(feeds, list(expected))
        return compare_tensors(self.name, found, expected, tolerance_of(self.precision).error)


def candidates(bundle: Bundle, name: str | None, window: int, cpu: CpuOptions) -> Iterator[Candidate]:
    """Open one engine after the other.

    ``name`` is of a form or a backend; None: every form, on the processor.

    Raises:
        UsageError: there is no such form or backend, or the window does not fit.
        EngineError: there is no GPU, or no engine that fits it.
    """
    check_window(bundle.manifest, window)
    forms = {form.value for form in forms_of(bundle)}
    if name is not None and name not in (*forms, *names()):
        raise unknown(f"engine of {bundle.path}", name, (*forms, *names()))
    if name is None or name in forms:
        return _of_each_form(bundle, name, window, cpu)
    backend = find(name)
    backend.describe()  # without a device there is nothing to say of the bundle
    return of_backend(bundle, backend, window, cpu)


def _of_each_form(bundle: Bundle, name: str | None, window: int, cpu: CpuOptions) -> Iterator[Candidate]:
    for one in map(bundle.at_precision, bundle.manifest.precisions):
        for form in forms_of(one):
            if name in (None, form.value):
                session = open_session(one, window=window, cpu=cpu, form=form)
                precision = one.manifest.precisions[0]
                yield Candidate(f"{form.value} {precision}", one, session, cpu, precision)


def of_backend(bundle: Bundle, backend: Backend, window: int, cpu: CpuOptions) -> Iterator[Candidate]:
    """Engines of a backend over every precision that has a graph for it."""
    each = map(bundle.at_precision, bundle.manifest.precisions)
    usable = [one for one in each if set(backend.forms) & set(forms_of(one))]
    if not usable:
        forms = " or ".join(form.value for form in backend.forms)
        raise UsageError(f"{bundle.path} has no graph for {backend.name}; export it with --form {forms}")
    for one in usable:
        session = open_session(one, window=window, cpu=cpu, backend=backend)
        stored = one.manifest.precisions[0]
        computed = backend.computes(stored)
        shown = stored if computed == stored else f"{stored} in {computed}"
        yield Candidate(f"{backend.name} {shown}", one, session, cpu, computed)


_FLIP_FRAMES: Final = 2  # a pass for every cell of these


@dataclass(frozen=True)
class Exactness:
    """One engine, by the sampling of its bundle.

    Attributes:
        engine: its name.
        flips: share of cells that are drawn otherwise in the widest pass than in a pass of their own, the
            tokens ahead of them being the same. Where it is 0, what is exact in theory is exact here.
        shares: by decoder, share of its cells that next-token prediction draws behind the same tokens.
    """

    engine: str
    flips: float
    shares: dict[str, float]


def exactness(
    session: Session, name: str, orders: Sequence[Schedule], workload: Workload, frames: int, seed: int = 0
) -> Exactness:
    """Decode by Jacobi and by each order, and audit what was decoded."""
    decoders: dict[str, Decoder] = {"jacobi": JacobiDecoder()}
    decoders |= {order.name: ScheduledDecoder(order) for order in orders}
    tokens, shares = dict[str, Int](), dict[str, float]()
    for spelled, decoder in decoders.items():
        made = session.frames(decoder, workload.start(session, frames), count=frames, seed=seed)
        tokens[spelled] = np.stack([frame.tokens for frame in made])
        audited = audit(session, tokens[spelled], workload.start(session, frames), seed=seed)
        shares[spelled] = float(audited.mean())
    few = tokens["jacobi"][:_FLIP_FRAMES]
    narrow, wide = (
        redrawn(session, few, workload.start(session, len(few)), rows=rows, seed=seed) for rows in (1, None)
    )
    return Exactness(name, float((narrow != wide).mean()), shares)


Tensors = dict[str, NDArray[Any]]
"""Inputs or outputs of a step graph, by name."""


@dataclass(frozen=True)
class TensorVerdict:
    """One output of a step: the greatest difference over the greatest value of the reference."""

    engine: str
    tensor: str
    error: float
    passed: bool


def compare_tensors(engine: str, found: Tensors, expected: Tensors, bound: float) -> list[TensorVerdict]:
    """Compare the outputs of one step on an engine with those of ``plain_outputs``, in the graph's order.

    Where an engine fails its gate, its cells say so; these tensors say in which layer it begins. ``bound`` is
    of the greatest difference over the greatest value of the reference, for every tensor.
    """
    verdicts = []
    for name, values in expected.items():
        right, seen = values.astype(np.float32), found[name].astype(np.float32)
        error = float(np.abs(seen - right).max()) / max(float(np.abs(right).max()), 1e-30)
        verdicts.append(TensorVerdict(engine, name, error, error <= bound))
    return verdicts


def plain_outputs(graph: Path, feeds: Tensors) -> Tensors:
    """All outputs of a step on one thread of ONNX Runtime's CPU provider with its optimiser off.

    Arrays that the graph does not take are left out.
    """
    session = open_plainly(graph)
    taken = {value.name: feeds[value.name] for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, taken), strict=True))


def capture_feeds(session: Session, engine: Executor, pad: Callable[[Int], Int]) -> Tensors:
    """Inputs of the step that decodes most cells of a serial frame behind two known ones.

    ``pad`` gives the widths in which the engine to compare runs so many rows.
    """
    layout, workload = session.layout, random_workload(session, min(2, session.window - 1), 1)
    schedule = Schedule.serial(layout, 1, session.manifest.schedule.row_seed)
    kept, most, rows = Tensors(), 0, 0
    for step, _ in session.steps(ScheduledDecoder(schedule), workload.start(session, 1), count=1):
        if (decoded := int((step.sinks != NO_SINK).sum())) > most:
            kept, most, rows = engine.inputs(), decoded, step.width
    return _padded(kept, rows, int(pad(np.array([rows], np.int32))[0]))


def _padded(feeds: Tensors, rows: int, width: int) -> Tensors:
    """The same step at another width; pad rows are as ``advance`` of the kernels makes them."""
    pads = {"sources": 0, "positions": feeds["positions"][rows - 1]}
    return feeds | {
        name: np.append(feeds[name][:rows], np.full(width - rows, pad, feeds[name].dtype))
        for name, pad in pads.items()
    }
