"""From a bundle to a report: next-token prediction, serial and chained frames, measured alike."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from diagd.bundle import Bundle, Form
from diagd.engines.backend import Backend, find, forms_of
from diagd.engines.ceilings import Ceilings
from diagd.engines.host import cores, memory_bytes, peak_memory, processor_name
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError, unknown
from diagd.planning.machine import installed
from diagd.planning.model import StoredModel, read_model
from diagd.profiling.budget import LEAST_FRAMES, Extent, Pace, cuts, find_pace, fit
from diagd.profiling.measure import Measured, measure, random_workload
from diagd.profiling.orders import decoding_orders, obstacle
from diagd.profiling.report import Machine, Report, Skipped, Subject
from diagd.profiling.summary import stages, summarise
from diagd.profiling.timeline import Timeline
from diagd.progress import Progress
from diagd.runtime.load import open_session, with_threads
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.session import Session
from diagd.schedule import Schedule
from diagd.version import __version__

PACKAGES: Final = ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings")
CPU: Final = "cpu"
SPENT: Final = "the time budget was spent"


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure.

    Attributes:
        ks: row lags; each runs with serial and with chained frames.
        backend: by its name: ``cpu``, or a GPU's: ``cuda``, ``tensorrt``, ``tensorrt_rtx``.
        engine: form of the step graph on the processor; default: what ``open_session`` takes.
        precision: of the step graph; default: that of the bundle's first graph.
        frames: measured of each order.
        prompt: frames known ahead; default: a full window, where a step costs what it costs for ever.
        window: frames a token may see; default: the model's context.
        fps: rate whose deadlines are counted.
        pixels: decode and encode pictures, where the bundle has a tokenizer.
        budget: seconds in which to end; frames and prompt are cut to fit. None: no limit.
        marks: put NVTX ranges around the steps, where nvtx is installed.
        cpu: threads and cache.

    Raises:
        UsageError: too few frames.
    """

    ks: tuple[int, ...] = (1, 2)
    backend: str = CPU
    engine: str | None = None
    precision: str | None = None
    frames: int = 4
    prompt: int | None = None
    window: int | None = None
    fps: float | None = None
    pixels: bool = True
    budget: float | None = None
    marks: bool = False
    cpu: CpuOptions = field(default_factory=CpuOptions)

    def __post_init__(self) -> None:
        if self.frames < LEAST_FRAMES:
            raise UsageError(f"--frames {self.frames}: steady frames need two or more")


@dataclass(frozen=True)
class Profile:
    """A report, and the runs behind it."""

    report: Report
    runs: tuple[Measured, ...]
    timeline: Timeline


def profile(
    bundle: Bundle,
    options: ProfileOptions,
    progress: Progress | None = None,
    tell: Callable[[str], object] = lambda _: None,
    backend: Backend | None = None,
) -> Profile:
    """Measure a bundle on this machine.

    Args:
        bundle: what to measure.
        options: how.
        progress: shows it.
        tell: takes the estimate, and what is cut, before the measurement begins.
        backend: where; default: what the options name.

    Raises:
        UsageError: a window or prompt that cannot be measured.
        ScheduleError: a lag that the model does not allow.
        EngineError: the engine cannot be loaded.
    """
    began, progress = time.perf_counter(), progress or Progress()
    backend, bundle = backend or _backend(options), bundle.at_precision(options.precision)
    orders = decoding_orders(bundle.manifest, options.ks)
    options = replace(options, cpu=with_threads(options.cpu, bundle))
    description = backend.describe()
    ready = _load(bundle, options, backend, progress)
    with ready.session as session:
        course = _course(ready, orders, options, began, progress)
        told = f"about {course.estimate:.0f} s for {len(course.orders)} decoding orders"
        tell("; ".join([told, *course.cuts]))
        pairs, late = _run_each(course, ready.pixels, progress, _Clock(began, options.budget), options.marks)
        device_memory = session.engine.memory_used() if description else 0
    report = Report(
        diagd_version=__version__,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=_machine(ready.ceilings, description, options.cpu),
        subject=_subject(bundle, ready.model, ready.session),
        start=stages(ready.start),
        runs=tuple(summarise(run, cold, ready.model, ready.ceilings, options.fps) for cold, run in pairs),
        skipped=(*course.skipped, *late),
        peak_memory=peak_memory(),
        device_memory=device_memory,
        estimate=course.estimate,
        cuts=course.cuts,
    )
    return Profile(report, tuple(run for _, run in pairs), ready.start)


@dataclass(frozen=True)
class _Ready:
    """What is measured, loaded, the limits that hold for it, and what loading took."""

    session: Session
    pixels: PixelCodec | None
    model: StoredModel
    ceilings: Ceilings
    start: Timeline


@dataclass(frozen=True)
class _Course:
    """The runs to come, the seconds they are expected to take, and what was left out."""

    pace: Pace
    orders: tuple[Schedule, ...]
    skipped: tuple[Skipped, ...]
    extent: Extent
    estimate: float
    cuts: tuple[str, ...]


@dataclass(frozen=True)
class _Clock:
    """Whether the budget has time left."""

    began: float
    budget: float | None

    def left(self, seconds: float) -> bool:
        """Whether work of so many seconds ends in time."""
        return self.budget is None or time.perf_counter() - self.began + seconds < self.budget


def _backend(options: ProfileOptions) -> Backend:
    """The backend that the options name."""
    if options.engine is not None and options.backend != CPU:
        raise UsageError(
            f"engine={options.engine} is a form on the CPU; backend={options.backend} takes the one that "
            "suits it"
        )
    return find(options.backend)


def _form(bundle: Bundle, name: str | None) -> Form | None:
    """The form called ``name``; None is the backend's choice."""
    there = {form.value: form for form in forms_of(bundle)}
    if name is not None and name not in there:
        raise unknown(f"engine of {bundle.path}", name, there)
    return None if name is None else there[name]


def _load(bundle: Bundle, options: ProfileOptions, backend: Backend, progress: Progress) -> _Ready:
    """Measure the limits while nothing else is there, then load."""
    start, form = Timeline(), _form(bundle, options.engine)
    with progress.task("measuring this machine"):
        ceilings = backend.ceilings(options.cpu.threads)
    with progress.task("loading"):
        with start.stage("load"):
            session = open_session(bundle, window=options.window, cpu=options.cpu, backend=backend, form=form)
        pixels = _pixels(bundle, options, backend, start)
    model = read_model(bundle.path, options.precision, session.engine.form)
    return _Ready(session, pixels, model, ceilings, start)


def _course(
    ready: _Ready,
    orders: Sequence[Schedule],
    options: ProfileOptions,
    began: float,
    progress: Progress,
) -> _Course:
    """What fits into the rest of the budget behind ``began``; a prompt asked for is kept."""
    session = ready.session
    chosen, skipped = _split(orders, session, options)
    with progress.task("estimating"):
        pace = find_pace(session, ready.model, ready.ceilings, ready.pixels)
        wanted = extent = Extent(_prompt(session, options), options.frames)
        if options.budget is not None:
            rest = options.budget - (time.perf_counter() - began)
            keep = options.prompt is not None
            extent = fit(pace, chosen, wanted, rest, keep_prompt=keep)
        estimate = pace.seconds(chosen, extent)
    return _Course(pace, tuple(chosen), skipped, extent, estimate, cuts(wanted, extent, session.window))


def _prompt(session: Session, options: ProfileOptions) -> int:
    return session.window - 1 if options.prompt is None else options.prompt


def _split(
    orders: Sequence[Schedule], session: Session, options: ProfileOptions
) -> tuple[list[Schedule], tuple[Skipped, ...]]:
    """Orders that the model allows, and the others with the reason.

    Raises:
        UsageError: it allows none.
    """
    frames = _prompt(session, options) + options.frames
    widest = session.engine.max_width
    reasons = [obstacle(order, session.manifest, session.window, frames, widest) for order in orders]
    pairs = list(zip(orders, reasons, strict=True))
    skipped = tuple(Skipped(order=order.name, reason=why) for order, why in pairs if why)
    if len(skipped) == len(pairs):
        raise UsageError(f"no decoding order can be measured; {skipped[0].order}: {skipped[0].reason}")
    return [order for order, why in pairs if not why], skipped


def _pixels(bundle: Bundle, options: ProfileOptions, backend: Backend, start: Timeline) -> PixelCodec | None:
    """The tokenizer, loaded and warm, its encoder timed on a random picture."""
    if bundle.manifest.tokenizer is None or not options.pixels:
        return None
    pixels = PixelCodec(bundle, options.cpu, backend)
    spec = pixels.spec
    picture = np.random.default_rng(0).integers(0, 256, (1, spec.height, spec.width, 3), dtype=np.uint8)
    with start.stage("load tokenizer"):
        tokens = pixels.encode(picture)
        list(pixels.decode(iter(tokens)))
    for _ in range(3):
        with start.stage("prompt encode"):
            pixels.encode(picture)
    return pixels


def _run_each(
    course: _Course, pixels: PixelCodec | None, progress: Progress, clock: _Clock, marks: bool
) -> tuple[list[tuple[float | None, Measured]], list[Skipped]]:
    """Runs of the orders, the first one in any case, and the orders that there was no time for."""
    pairs: list[tuple[float | None, Measured]] = []
    late, began = [], time.perf_counter()
    pace, orders, extent, session = course.pace, course.orders, course.extent, course.pace.session
    for number, schedule in enumerate(orders, start=1):
        name = schedule.name
        slower = pace.slower([run.schedule for _, run in pairs], extent, time.perf_counter() - began)
        rest = slower * pace.seconds(orders[number - 1 :], extent)
        # An order that mostly fits is worth more than an exact end.
        if pairs and not clock.left(slower * pace.seconds([schedule], extent) / 2):
            late.append(Skipped(order=name, reason=SPENT))
            continue
        title = f"{name}, {number} of {len(orders)} orders, {rest:.0f} s left"
        with progress.count(title, _steps(session, schedule, extent)) as advance:
            pairs.append(_run(session, schedule, extent, pixels, advance, marks))
    return pairs, late


def _steps(session: Session, schedule: Schedule, extent: Extent) -> int:
    """Steps of all runs of an order."""
    tables = (
        schedule.table(extent.prompt, frames, 0, session.engine.max_width)
        for frames in extent.runs_of(schedule)
    )
    return sum(table.steps for table in tables)


def _run(
    session: Session,
    schedule: Schedule,
    extent: Extent,
    pixels: PixelCodec | None,
    advance: Callable[[int], object],
    marks: bool,
) -> tuple[float | None, Measured]:
    """Seconds of one frame as the first run of an order, if there is one, then the measured frames."""
    frames = extent.frames_of(schedule)
    workload = random_workload(session, extent.prompt, frames)
    first, told = None, partial(measure, session, schedule, workload, advance=advance, marks=marks)
    if extent.cold:
        run = told(1, pixels)
        first = run.ended - run.began
    with TemporaryDirectory() as folder:
        video = Path(folder) / "frames.gif"
        return first, told(frames, pixels, video)


def _machine(ceilings: Ceilings, device: str, cpu: CpuOptions) -> Machine:
    found = {name: installed(name) for name in PACKAGES}
    return Machine(
        processor=processor_name(),
        cores=cores(),
        threads=ceilings.threads or cpu.threads or cores(),
        memory=memory_bytes(),
        platform=platform.platform(),
        versions={"python": platform.python_version()}
        | {name: version for name, version in found.items() if version},
        copied=ceilings.copied,
        read=ceilings.read,
        peak=ceilings.peak,
        device=device,
    )


def _subject(bundle: Bundle, model: StoredModel, session: Session) -> Subject:
    return Subject(
        model=bundle.manifest.name,
        digest=bundle.digest,
        precision=bundle.manifest.graphs[0].precision,
        engine=session.engine.form.value,
        window=session.window,
        parameters=model.size.streamed + model.size.looked_up,
        weight_bytes=model.streamed_bytes,
    )
