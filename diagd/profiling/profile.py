"""From a bundle to a report: next-token prediction, serial and chained frames, measured alike."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.planning.ceilings import Ceilings, measure_ceilings, memory_bytes
from diagd.planning.cost import step_operations, step_seconds
from diagd.planning.model import StoredModel, read_model
from diagd.profiling.budget import LEAST_FRAMES, Extent, Pace, cuts, find_pace, fit
from diagd.profiling.engines import find_form, open_engine, session_over
from diagd.profiling.ladder import Ladder
from diagd.profiling.measure import Measured, bucket, measure, random_workload
from diagd.profiling.orders import decoding_orders, obstacle, order_name
from diagd.profiling.report import (
    Deadlines,
    Machine,
    Report,
    Run,
    Skipped,
    SlowStep,
    Stage,
    StepSample,
    Subject,
    Width,
)
from diagd.profiling.statistics import describe, slow_ones
from diagd.profiling.timeline import Timeline
from diagd.profiling.trace import nvtx_ranges
from diagd.progress import Progress
from diagd.runtime.load import open_session
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.session import Session, StepTime
from diagd.schedule import Schedule
from diagd.version import __version__

SLOW_STEPS: Final = 20
SAMPLES: Final = 5000
SPENT: Final = "the time budget was spent"


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure.

    Attributes:
        ks: row lags; each runs with serial and with chained frames.
        engine: form of the step graph; default: what ``open_session`` takes.
        precision: of the step graph; default: that of the bundle's first graph.
        frames: measured of each order.
        prompt: frames known ahead; default: a full window, where a step costs what it costs for ever.
        window: frames a token may see; default: the model's context.
        fps: rate whose deadlines are counted.
        pixels: decode and encode pictures, where the bundle has a tokenizer.
        ladder: measure the engine's optimisations one by one.
        budget: seconds in which to end; frames and prompt are cut to fit. None: no limit.
        marks: put NVTX ranges around the steps, where nvtx is installed.
        cpu: threads and cache.

    Raises:
        UsageError: too few frames.
    """

    ks: tuple[int, ...] = (1, 2)
    engine: str | None = None
    precision: str | None = None
    frames: int = 4
    prompt: int | None = None
    window: int | None = None
    fps: float | None = None
    pixels: bool = True
    ladder: bool = True
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
) -> Profile:
    """Measure a bundle on this machine.

    Args:
        bundle: what to measure.
        options: how.
        progress: shows it.
        tell: takes the estimate, and what is cut, before the measurement begins.

    Raises:
        UsageError: a window or prompt that cannot be measured.
        ScheduleError: a lag that the model does not allow.
        EngineError: the engine cannot be loaded.
    """
    began, progress = time.perf_counter(), progress or Progress()
    whole, bundle = bundle, bundle.at_precision(options.precision)
    model, orders = read_model(bundle.path, options.precision), decoding_orders(bundle.manifest, options.ks)
    with progress.task("measuring this machine"):
        ceilings = measure_ceilings(options.cpu.threads)
    session, pixels, start = _load(bundle, options, progress)
    chosen, skipped = _split(orders, session, options)
    with progress.task("estimating"):
        pace = find_pace(session, model, ceilings, pixels)
        extent, estimate, left_out = _extent(pace, chosen, options, began)
    tell("; ".join([f"about {estimate:.0f} s for {len(chosen)} decoding orders", *left_out]))
    clock = _Clock(began, options.budget)
    with nvtx_ranges(session) if options.marks else nullcontext():
        pairs, late = _run_each(session, chosen, extent, pixels, progress, clock)
    climb = Ladder(whole, options.precision, session.window, options.cpu)
    with progress.task("climbing the ladder"):
        ladder = tuple(climb.rungs(clock.left)) if options.ladder else ()
    report = Report(
        diagd_version=__version__,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=_machine(ceilings),
        subject=_subject(bundle, model, session),
        start=_stages(start),
        runs=tuple(summarise(run, first, model, ceilings, options.fps) for first, run in pairs),
        skipped=(*skipped, *late),
        ladder=ladder,
        peak_memory=peak_memory(),
        estimate=estimate,
        cuts=left_out,
    )
    return Profile(report, tuple(run for _, run in pairs), start)


@dataclass(frozen=True)
class _Clock:
    """Whether the budget has time left."""

    began: float
    budget: float | None

    def left(self) -> bool:
        return self.budget is None or time.perf_counter() - self.began < self.budget


def _extent(
    pace: Pace, orders: Sequence[Schedule], options: ProfileOptions, began: float
) -> tuple[Extent, float, tuple[str, ...]]:
    """What fits into the rest of the budget, its seconds, and what was cut; a prompt asked for is kept."""
    session, keep_prompt = pace.session, options.prompt is not None
    wanted = extent = Extent(_prompt(session, options), options.frames)
    if options.budget is not None:
        rest = options.budget - (time.perf_counter() - began)
        extent = fit(pace, orders, wanted, rest, ladder=options.ladder, keep_prompt=keep_prompt)
    estimate = pace.seconds(orders, extent, ladder=options.ladder)
    return extent, estimate, cuts(wanted, extent, session.window)


def _load(
    bundle: Bundle, options: ProfileOptions, progress: Progress
) -> tuple[Session, PixelCodec | None, Timeline]:
    """A session, the tokenizer, and what it took."""
    start = Timeline()
    with progress.task("loading"):
        with start.stage("load"):
            session = _open(bundle, options)
        return session, _pixels(bundle, options, start), start


def _open(bundle: Bundle, options: ProfileOptions) -> Session:
    if options.engine is None:
        return open_session(bundle, window=options.window, cpu=options.cpu)
    form, window = find_form(bundle, options.engine), options.window or bundle.manifest.context.frames
    return session_over(bundle, open_engine(bundle, form, window, options.cpu), window, options.cpu)


def _prompt(session: Session, options: ProfileOptions) -> int:
    return session.window - 1 if options.prompt is None else options.prompt


def _split(
    orders: Sequence[Schedule], session: Session, options: ProfileOptions
) -> tuple[list[Schedule], tuple[Skipped, ...]]:
    """Orders that the model allows, and the others with the reason."""
    frames = _prompt(session, options) + options.frames
    reasons = [obstacle(order, session.manifest, session.window, frames) for order in orders]
    pairs = list(zip(orders, reasons, strict=True))
    skipped = tuple(Skipped(order=order_name(order), reason=why) for order, why in pairs if why)
    return [order for order, why in pairs if not why], skipped


def _pixels(bundle: Bundle, options: ProfileOptions, start: Timeline) -> PixelCodec | None:
    """The tokenizer, loaded and warm, its encoder timed on a random picture."""
    if bundle.manifest.tokenizer is None or not options.pixels:
        return None
    pixels = PixelCodec(bundle, options.cpu)
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
    session: Session,
    orders: Sequence[Schedule],
    extent: Extent,
    pixels: PixelCodec | None,
    progress: Progress,
    clock: _Clock,
) -> tuple[list[tuple[float | None, Measured]], list[Skipped]]:
    """Runs of the orders, the first one in any case, and the orders that there was no time for."""
    pairs: list[tuple[float | None, Measured]] = []
    late = []
    for schedule in progress.each(orders, "decoding orders"):
        if pairs and not clock.left():
            late.append(Skipped(order=order_name(schedule), reason=SPENT))
        else:
            pairs.append(_run(session, schedule, extent, pixels))
    return pairs, late


def _run(
    session: Session, schedule: Schedule, extent: Extent, pixels: PixelCodec | None
) -> tuple[float | None, Measured]:
    """Seconds of one frame as the first run of an order, if there is one, then the measured frames."""
    frames = extent.frames_of(schedule)
    workload = random_workload(session, extent.prompt, frames)
    first = None
    if extent.cold:
        run = measure(session, schedule, workload, 1, pixels)
        first = run.ended - run.began
    with TemporaryDirectory() as folder:
        video = Path(folder) / "frames.gif"
        return first, measure(session, schedule, workload, frames, pixels, video)


def summarise(
    run: Measured, first: float | None, model: StoredModel, ceilings: Ceilings, fps: float | None
) -> Run:
    """Everything a report says of a run."""
    schedule, shown = run.schedule, np.asarray(run.shown)
    intervals = np.diff(shown)
    taken = np.asarray([run.taken(frame) for frame in range(run.frames)])
    steady = float(shown[-1] - shown[0])
    shown_frames = model.size.pixel_frames * (run.frames - 1)
    return Run(
        order=order_name(schedule),
        k=schedule.k,
        d=schedule.d,
        frames=run.frames,
        passes=len(run.steps),
        first_run=first,
        time_to_first_frame=run.shown[0] - run.began,
        wall=run.ended - run.began,
        frames_per_second=shown_frames / steady if steady > 0 else 0.0,
        intervals=describe(intervals),
        action_latency=describe((shown - taken)[1:]),
        action_latency_worst=describe(shown[1:] - taken[:-1]),
        deadlines=_deadlines(intervals, fps),
        stages=_stages(run.timeline),
        widths=tuple(_widths(run, model, ceilings)),
        slow_steps=tuple(_slow_steps(run.steps)),
        samples=tuple(_samples(run)),
    )


def _stages(timeline: Timeline) -> tuple[Stage, ...]:
    return tuple(Stage(name=name, seconds=describe(s)) for name, s in timeline.seconds().items())


def _deadlines(intervals: NDArray[np.float64], fps: float | None) -> Deadlines | None:
    if fps is None:
        return None
    late = intervals - 1 / fps
    worst = float(max(0.0, late.max(initial=0.0)))
    return Deadlines(fps=fps, frames=len(late), missed=int((late > 0).sum()), worst=worst)


def _widths(run: Measured, model: StoredModel, ceilings: Ceilings) -> list[Width]:
    """Buckets of widths behind the prompt, narrow ones first."""
    buckets: dict[str, list[StepTime]] = {}
    for step in sorted(run.steps[run.chunks + 1 :], key=lambda step: step.rows):
        buckets.setdefault(bucket(step.rows), []).append(step)
    return [_width(name, steps, model, ceilings) for name, steps in buckets.items()]


def _width(name: str, steps: list[StepTime], model: StoredModel, ceilings: Ceilings) -> Width:
    rows = float(np.mean([step.rows for step in steps]))
    live = float(np.mean([step.live for step in steps]))
    read = model.streamed_bytes + model.cache_bytes * model.size.cache_elements * live
    operations = step_operations(model.size, rows, live)
    seconds = describe([step.engine for step in steps])
    least = step_seconds(read, operations, ceilings.bandwidth, ceilings.peak)
    bound: Literal["memory", "arithmetic"] = (
        "memory" if read / ceilings.bandwidth >= operations / ceilings.peak else "arithmetic"
    )
    return Width(
        name=name,
        steps=len(steps),
        rows=rows,
        seconds=seconds,
        bytes=read,
        operations=operations,
        bandwidth=read / seconds.p50,
        share=least / seconds.p50,
        bound=bound,
    )


def _slow_steps(steps: Sequence[StepTime]) -> list[SlowStep]:
    seconds = [step.engine + step.sampling + step.host for step in steps]
    rows = [step.rows for step in steps]
    found = []
    for index in slow_ones(seconds, rows)[:SLOW_STEPS]:
        alike = [s for s, width in zip(seconds, rows, strict=True) if width == rows[index]]
        usual = float(np.median(alike))
        found.append(SlowStep(step=index, rows=rows[index], seconds=seconds[index], usual=usual))
    return found


def _samples(run: Measured) -> list[StepSample]:
    return [
        StepSample(
            at=step.began - run.began,
            rows=step.rows,
            engine=step.engine,
            sampling=step.sampling,
            host=step.host,
        )
        for step in run.steps[:SAMPLES]
    ]


def _machine(ceilings: Ceilings) -> Machine:
    from importlib.metadata import version

    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        threads=ceilings.threads,
        memory=memory_bytes(),
        platform=platform.platform(),
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "onnxruntime")},
        copied=ceilings.copied,
        read=ceilings.read,
        peak=ceilings.peak,
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _subject(bundle: Bundle, model: StoredModel, session: Session) -> Subject:
    return Subject(
        model=bundle.manifest.name,
        digest=bundle.digest,
        precision=bundle.manifest.graphs[0].precision,
        engine=type(session.engine).__name__,
        window=session.window,
        parameters=model.size.streamed + model.size.looked_up,
        weight_bytes=model.streamed_bytes,
    )


def peak_memory() -> int:
    """Most bytes this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
