"""What benchmarks/gpu.py measures: engines with and without CUDA graphs, PyTorch eager and compiled.

Behind it: checks ahead of the tables, whether what is about to be timed is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks import CONSOLE
from benchmarks.gpu_report import JACOBI, NEXT_TOKEN, Row
from diagd.bundle import Bundle, Form
from diagd.engines.backend import StepOptions, find, graphs_of
from diagd.engines.ceilings import Ceilings
from diagd.engines.devices import Device
from diagd.engines.devices.kernels import SAMPLE, SampleArguments
from diagd.engines.engine import VOID, Engine, SamplingState, Steps
from diagd.engines.records import RecordRing
from diagd.engines.sampler import draw_plain
from diagd.export.families import Family
from diagd.profiling.cost import StoredModel, read_model, step_operations
from diagd.profiling.measure import random_workload
from diagd.runtime.decoders import Decoder, JacobiDecoder, ScheduledDecoder
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.slots import TokenPlaces
from diagd.schedule import Block, Schedule, StreamLayout, Table

if TYPE_CHECKING:  # PyTorch is loaded where it is asked for
    from torch import Tensor

    from benchmarks.baselines import PublishedForm

FLOAT: Final = "fp16"
"""Precision of what is measured, where none is named."""

GREEDY = SamplingSettings(temperature=0.0)
FRAMES = 3
PARTS = ("diagd, CUDA graphs", "diagd", "published form, compiled", "published form, eager")

SOME_STEPS = 256
"""Of the published form that are timed: its static cache makes each cost the same."""

REPEATS = 3
ENOUGH = 6.0
"""Seconds of runs after which none is repeated."""

MakeEngine = Callable[[Bundle, int, bool], Engine]
"""From a bundle, the size of the token buffer, and whether graphs are replayed."""


Timed = Iterator[tuple["Case", dict[str, Any]]]
"""Cases with what a row says of their fastest run."""


@dataclass(frozen=True)
class Case:
    """A schedule, the known frames ahead of it, and the frames it decodes."""

    name: str
    schedule: Schedule
    known: int
    frames: int
    rows: int | None = None  # of a pass, where it is not the schedule's

    @property
    def table(self) -> Table:
        """Its steps, all known tokens but the last being cached."""
        return self.schedule.table(self.known, self.frames, self.schedule.layout.first_cell(self.known) - 1)

    def row(self, steps: int, seconds: float) -> dict[str, Any]:
        return {"schedule": self.name, "frames": self.frames, "steps": steps, "seconds": seconds}


def cases(layout: StreamLayout, frames: int) -> Iterator[Case]:
    """Next-token prediction for one frame in the middle of where the others decode ``frames``, then those."""
    yield Case(NEXT_TOKEN, Schedule.next_token(layout), 2 + frames // 2, 1)
    for k in (1, 2):
        yield Case(f"k={k} serial", Schedule.serial(layout, k), 2, frames)
        yield Case(f"k={k} chained", Schedule.chained(layout, k), 2, frames)


def widths_of(layout: StreamLayout, frames: int) -> tuple[int, ...]:
    """1, and the commonest and the widest step of every schedule in multiples of 8."""
    found = {1}
    for case in cases(layout, frames):
        widths = case.table.widths
        commonest, widest = int(np.bincount(widths).argmax()), int(widths.max())
        found |= {-(-width // 8) * 8 for width in (commonest, widest) if width > 1}
    return tuple(sorted(found))


def make_bundle(family: Family, folder: Path, frames: int, precision: str = FLOAT) -> Bundle:
    """The model with random weights in a precision, in the modern form; made where it is missing."""
    from diagd.calibration.options import CalibrationOptions
    from diagd.calibration.quantise import calibrate
    from diagd.export.exporter import export, random_sources
    from diagd.export.options import GraphOptions
    from diagd.progress import Progress

    path, widths = folder / f"{family.name}.diagd", widths_of(family.transformer.layout, frames)
    progress = Progress(CONSOLE)
    if not path.is_dir() or _widths(Bundle.open(path)) != widths:
        sources = replace(random_sources(family, seed=0), tokenizer=None)
        export(family, GraphOptions((Form.MODERN,), FLOAT, widths), sources, path, progress)
    bundle = Bundle.open(path)
    if precision not in bundle.manifest.precisions:
        calibrate(bundle, CalibrationOptions(precision, None), progress=progress)
    return Bundle.open(path).at_precision(precision)


def _widths(bundle: Bundle) -> tuple[int | None, ...]:
    return tuple(graph.width for graph in graphs_of(bundle.at_precision(FLOAT), Form.MODERN))


@dataclass(frozen=True)
class Bench:
    """Measures parts of the comparison.

    ``frames`` are those of a diagonal run; ceilings are measured in this process.
    """

    make_engine: MakeEngine
    ceilings: Ceilings
    frames: int = FRAMES
    torch_device: str = "cuda"

    def measure(self, bundle: Bundle, family: Family, part: str) -> list[Row]:
        """Rows of one of ``PARTS`` over a family's bundle.

        Raises:
            EngineError: the engine cannot be opened.
            UsageError: the published form is not written for the model.
        """
        stored = read_model(bundle.at_precision(), Form.MODERN)
        published = "published" in part
        taken = self._published(bundle, family, part) if published else self._engine(bundle, part)
        return [self._row(stored, case, model=family.name, runtime=part, **best) for case, best in taken]

    def _row(self, stored: StoredModel, case: Case, **told: Any) -> Row:
        """With what a step must read and compute in the mean, and the limits of the device."""
        layout = case.schedule.layout
        rows = float(case.table.widths.mean()) if case.rows is None else case.rows
        live = layout.frame_start(case.known) + case.frames * layout.frame_length / 2
        return Row(
            bytes_read=stored.step_bytes(live),
            operations=step_operations(stored.size, rows, live),
            bandwidth=self.ceilings.bandwidth,
            peak=self.ceilings.peak,
            **told,
        )

    def _engine(self, bundle: Bundle, part: str) -> Timed:
        manifest = bundle.manifest
        layout, window = manifest.layout, manifest.context.frames
        places = TokenPlaces(layout, window).size
        with closing(self.make_engine(bundle, places, part.endswith("graphs"))) as engine:
            session = Session(manifest, engine, window)
            for case in cases(layout, self.frames):
                yield case, decode_with(session, case, ScheduledDecoder(case.schedule))
                last = case
            # random weights accept hardly a draft: that many passes of one frame say what one costs
            jacobi = replace(last, name=JACOBI, frames=1, rows=min(engine.max_width, layout.cells))
            yield jacobi, decode_with(session, jacobi, JacobiDecoder(jacobi.rows))

    def _published(self, bundle: Bundle, family: Family, part: str) -> Timed:
        import torch

        from benchmarks.baselines import PublishedForm

        config, layout = family.transformer, bundle.manifest.layout
        positions = layout.frame_start(2 + self.frames) + 1
        weights, device = stored_weights(bundle, family), self.torch_device
        form = PublishedForm(weights, config, torch.float16, positions, device)
        compiled = part.endswith("compiled")
        widths = widths_of(layout, self.frames) if compiled else ()
        if compiled:
            form._forward = captured(form)  # type: ignore[method-assign]
        wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
        for case in cases(layout, self.frames):
            table = case.table
            form.prefill(layout.first_cell(case.known) - 1)
            some = first_steps(table, SOME_STEPS)
            for _ in range(2):  # the compiler captures a graph when a width comes for the second time
                form.decode(first_steps(table) if case.name == NEXT_TOKEN else table, widths=widths)
            seconds = repeated(lambda: timed(partial(form.decode, some, widths=widths), wait))  # noqa: B023
            best = min(seconds) * table.steps / some.steps
            yield case, case.row(table.steps, best)


def decode_with(session: Session, case: Case, decoder: Decoder) -> dict[str, Any]:
    """Fastest run of a session: the last known frame is decoded too, so that the prompt is cached."""
    layout, prompt = session.layout, random_workload(session, case.known - 1, 0).prompt
    actions = np.zeros((case.frames + case.known, layout.gap), np.int32)
    warm = ScheduledDecoder(Schedule.serial(layout, 1))
    hosts = []

    def run() -> float:
        session.start(prompt, actions[: len(prompt)])
        for frame in session.frames(warm, actions[:1], sampling=GREEDY):
            del frame
        before, began = (session.timing.steps, session.timing.host), time.perf_counter()
        for frame in session.frames(decoder, actions[: case.frames], sampling=GREEDY):
            del frame  # asking for its tokens has waited for the device
        seconds = time.perf_counter() - began
        hosts.append((session.timing.steps - before[0], session.timing.host - before[1]))
        return seconds

    seconds = repeated(run)
    best = int(np.argmin(seconds))
    steps, host = hosts[best]
    return case.row(steps, seconds[best]) | {"host": host}


def repeated(run: Callable[[], float]) -> list[float]:
    """Seconds of a few runs, of fewer where they are long."""
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < ENOUGH:
        seconds.append(run())
    return seconds


def timed(work: Callable[[], object], wait: Callable[[], None]) -> float:
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def first_steps(table: Table, steps: int = 16) -> Block:
    """The beginning of a table, to warm up."""
    return table.block(0, min(steps, table.steps))


def captured(form: PublishedForm) -> Callable[..., Tensor]:
    """The step of a PyTorch form, compiled to one CUDA graph for each width."""
    import torch

    for cache in (form.keys, form.values):
        torch._dynamo.mark_static_address(cache)  # else a graph that writes to it is not captured
    compiled = torch.compile(form._forward, mode="reduce-overhead", dynamic=False, fullgraph=True)

    def step(*tensors: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*tensors)

    return step


def stored_weights(bundle: Bundle, family: Family) -> Mapping[str, Any]:
    """The transformer's weights, mapped from their file: a graph would lack norms whose gains are equal."""
    from diagd.export.exporter import Exporter
    from diagd.export.options import GraphOptions
    from diagd.export.weights import WEIGHTS_NAME

    placements = Exporter(family, GraphOptions((Form.MODERN,), FLOAT))._placements
    return {
        name.removeprefix("transformer."): np.memmap(
            bundle.file(WEIGHTS_NAME), place.dtype, "r", place.offset, place.shape
        )
        for name, place in placements.items()
        if name.startswith("transformer.")
    }


REPLAYS = 1000
LAUNCHES = 50
VOCABULARIES = (107, 8192, 64_000)
NEAR, NEAR_ROUNDED = 2e-2, 0.1
"""Relative error of float16 logits that are right, and where the processor rounds activations as well."""

Figures = dict[str, float]


def opened(bundle: Bundle, make_engine: MakeEngine) -> tuple[bool, Figures]:
    """The step graphs open with nothing left to the processor, and are captured."""
    began = time.perf_counter()
    with closing(make_engine(bundle, _places(bundle), True)) as engine:
        seconds, memory = time.perf_counter() - began, engine.memory_used()
    return True, {"open, s": seconds, "memory in use, GB": memory / 1e9, "widest": float(engine.max_width)}


def one_step(bundle: Bundle, make_engine: MakeEngine) -> tuple[bool, Figures]:
    """The logits of the widest step are those of the processor."""
    reference = StepOptions(0, _places(bundle), form=Form.MODERN)
    found: list[NDArray[Any]] = []
    for make in (
        partial(make_engine, bundle, _places(bundle), False),
        partial(find("cpu").open_steps, bundle, reference),
    ):
        with closing(make()) as engine:
            run_steps(engine, bundle, [engine.max_width])
            found.append(engine.logits().astype(np.float64))
    error = float(np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1]))
    agree = float((found[0].argmax(axis=1) == found[1].argmax(axis=1)).mean())
    near = NEAR if bundle.manifest.precisions[0] == FLOAT else NEAR_ROUNDED
    return error < near, {"relative error of logits": error, "rows of equal argmax": agree}


def replays(bundle: Bundle, make_engine: MakeEngine) -> tuple[bool, Figures]:
    """Captured steps of alternating widths draw what steps without graphs draw, time and again."""
    widths = [int(graph.width or 0) for graph in graphs_of(bundle, Form.MODERN)]
    drawn, seconds = [], []
    for graphs in (True, False):
        with closing(make_engine(bundle, _places(bundle), graphs)) as engine:
            began = time.perf_counter()
            drawn.append(run_steps(engine, bundle, [widths[n % len(widths)] for n in range(REPLAYS)]))
            seconds.append(time.perf_counter() - began)
    wrong = int((drawn[0] != drawn[1]).any(axis=1).sum())
    return not wrong, {
        "replays": REPLAYS,
        "steps that differ": wrong,
        "ms a replay": 1e3 * seconds[0] / REPLAYS,
        "ms without graphs": 1e3 * seconds[1] / REPLAYS,
    }


def samplers(device: Device) -> tuple[bool, Figures]:
    """The kernel draws NumPy's ids, from peaked and from flat laws."""
    random, equal, figures = np.random.default_rng(0), True, Figures()
    for ids in VOCABULARIES:
        for spread in (8.0, 1.0, 0.05):
            logits = (random.standard_normal((14, ids)) * spread).astype(np.float32)
            tokens, seconds = sampled(device, logits, SamplingState(1.0, 0, 0.8, 5))
            low, high = np.zeros(14, np.int32), np.full(14, ids, np.int32)
            wanted = draw_plain(logits, np.arange(14), SamplingState(1.0, 0, 0.8, 5), low, high, True)
            equal &= bool((tokens == wanted).all())
            figures[f"us, 14 x {ids} ids, deviation {spread:g}"] = 1e6 * seconds
    return equal, figures


def sampled(device: Device, logits: NDArray[np.float32], state: SamplingState) -> tuple[NDArray[Any], float]:
    """Tokens [R] of the kernel, and seconds of a launch."""
    rows, ids = logits.shape
    order = np.arange(rows, dtype=np.int32)
    ring, cursor = RecordRing(device), device.allocate(8)
    ranges = np.array([[0, ids]], np.int32)
    given = {"logits": logits, "ranges": ranges, "token_buffer": np.zeros(rows, np.int32)}
    addresses = {name: device.allocate(array.nbytes) for name, array in given.items()}
    for name, array in given.items():
        device.upload(addresses[name], array)
    steps = Steps.single(order, order, order, order, 0, 1, state)
    ring.send(replace(steps, cells=order.astype(np.int64)), 0)
    arguments = SampleArguments(
        records=ring.address,
        cursor=cursor,
        refused=device.allocate(8),
        **addresses,
        prefix=0,
        frame_length=1,
        vocabulary=ids,
        keep_crossing=True,
        width=rows,
    )
    device.launch(SAMPLE, arguments, rows, device.threads)
    device.mark(0)
    for _ in range(LAUNCHES):
        device.launch(SAMPLE, arguments, rows, device.threads)
    device.mark(1)
    tokens = np.empty(rows, np.int32)
    device.download(tokens, addresses["token_buffer"])
    device.synchronise()
    return tokens, device.seconds(0, 1) / LAUNCHES


def run_steps(engine: Engine, bundle: Bundle, widths: list[int]) -> NDArray[np.int32]:
    """Steps one after another over random tokens; ids [N, widest] that their rows draw, -1 behind those."""
    manifest, places = bundle.manifest, _places(bundle)
    known = min(engine.capacity, manifest.context.frames * manifest.layout.frame_length)
    low, high = manifest.cell_ranges[0, 0]
    ids = np.random.default_rng(0).integers(low, high, places, dtype=np.int32)
    engine.write_slots(np.full(engine.capacity, VOID, np.int32))
    engine.write_tokens(np.arange(places, dtype=np.int32), ids)
    drawn = np.full((len(widths), max(widths)), -1, np.int32)
    for number, width in enumerate(widths):
        rows = np.arange(width, dtype=np.int32)
        sinks, start = places - 1 - rows, number % max(1, known - 2 * max(widths))
        positions = start + manifest.layout.prefix + rows
        state = SamplingState(1.0, seed=7)
        engine.send(Steps.single(rows, positions, rows, sinks, start, start + width, state))
        engine.step()
        engine.draw()
        drawn[number, :width] = engine.read_tokens(sinks)
    return drawn


def _places(bundle: Bundle) -> int:
    return TokenPlaces(bundle.manifest.layout, bundle.manifest.context.frames).size


CHECKS: Final[dict[str, Callable[[Bundle, MakeEngine], tuple[bool, Figures]]]] = {
    "open strictly": opened,
    "one step against the processor": one_step,
    "replays of alternating widths": replays,
}
