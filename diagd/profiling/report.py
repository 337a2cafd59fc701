"""What a profile says, as data: the schema of ``report.json``, how runs become it, and how two compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from diagd.bundle.files import read_text, write_text
from diagd.engines.ceilings import Ceilings
from diagd.errors import UsageError, fault
from diagd.options import Frozen
from diagd.profiling.cost import StoredModel, step_operations, step_seconds
from diagd.profiling.measure import Measured, Timeline, bucket, name_of
from diagd.runtime.step import StepTime

SCHEMA_VERSION: Final = 2

Seconds = Annotated[float, Field(ge=0)]
Timed = TypeVar("Timed", StepTime, "StepSample")


class Statistics(Frozen):
    """Seconds of repeated work; ``jitter`` is the mean change from one to the next."""

    count: int
    total: float
    mean: float
    p50: float
    p90: float
    p99: float
    max: float
    jitter: float


def describe(seconds: Sequence[float] | NDArray[np.float64]) -> Statistics:
    """Describe times, in the order in which they happened; none gives zeros."""
    values = np.asarray(seconds if len(seconds) else (0.0,), np.float64)
    p50, p90, p99, most = np.percentile(values, (50, 90, 99, 100)).tolist()
    mean, total = float(values.mean()), float(values.sum())
    jitter = float(np.abs(np.diff(values)).mean()) if len(values) > 1 else 0.0
    return Statistics(
        count=len(seconds), total=total, mean=mean, p50=p50, p90=p90, p99=p99, max=most, jitter=jitter
    )


class Machine(Frozen):
    """Where it ran: processor, threads, memory in bytes, versions; and the measured limits.

    ``device`` has steps and limits where it is not ''; ``read`` is 0 there.
    """

    processor: str
    cores: int
    threads: int
    memory: int
    platform: str
    versions: dict[str, str]
    copied: float
    read: float
    peak: float
    device: str = ""

    @property
    def limits(self) -> str:
        """Both limits in words."""
        product = "float16" if self.device else "float32"
        bandwidth = max(self.copied, self.read) / 1e9
        return f"memory {bandwidth:.1f} GB/s, {product} matrix product {self.peak / 1e9:.0f} GFLOP/s"


class Model(Frozen):
    """What ran: name, digest of its bundle, weights' precision and engine."""

    name: str
    digest: str
    precision: str
    engine: str
    window: int
    parameters: int
    weight_bytes: int


class Stage(Frozen):
    """All work of one kind in a run. ``steps w=a-b`` is the engine's time of steps with so many rows."""

    name: str
    seconds: Statistics


class Width(Frozen):
    """Steps of a bucket of widths against the machine's limits.

    ``bytes`` and ``operations`` are of a mean step, by formula; ``share`` is the least possible time over
    the measured one, ``bound`` the limit that sets it.
    """

    name: str
    steps: int
    rows: float
    seconds: Statistics
    bytes: float
    operations: float
    bandwidth: float
    share: float
    bound: Literal["memory", "arithmetic"]


class Deadlines(Frozen):
    """Frames that came later than 1/fps after the one before."""

    fps: float
    frames: int
    missed: int
    worst: Seconds


class SlowStep(Frozen):
    """A step that took far longer than others of its width."""

    step: int
    rows: int
    seconds: Seconds
    usual: Seconds


class StepSample(Frozen):
    """One step: seconds since the run began, rows, and seconds by part."""

    at: Seconds
    rows: int
    engine: Seconds
    sampling: Seconds
    host: Seconds

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return self.engine + self.sampling + self.host


class Run(Frozen):
    """One decoding order.

    Attributes:
        order, k, d: which; other decoders have no lags.
        frames: decoded in the measured part.
        passes: steps of the measured part, those that feed the prompt included.
        first_run: seconds of one frame in a fresh session, which nothing else includes.
        time_to_first_frame: from the prompt to the first picture, warm.
        wall: seconds of the measured part; ``stages`` add up to it.
        frames_per_second: steady, behind the first frame; shown frames.
        intervals: between finished frames.
        action_latency: from taking an action to the picture that shows it.
        action_latency_worst: likewise for an action that just missed its frame.
    """

    order: str
    k: int | None
    d: int | None
    frames: int
    passes: int
    first_run: Seconds
    time_to_first_frame: Seconds
    wall: Seconds
    frames_per_second: float
    intervals: Statistics
    action_latency: Statistics
    action_latency_worst: Statistics
    deadlines: Deadlines | None
    stages: tuple[Stage, ...]
    widths: tuple[Width, ...]
    slow_steps: tuple[SlowStep, ...]
    samples: tuple[StepSample, ...]


class Skipped(Frozen):
    """An order, or a backend in a precision, that was not measured, and why."""

    order: str
    reason: str


class Report(Frozen):
    """The whole of ``report.json``.

    ``peak_memory``: most bytes of this process; ``device_memory``: of the device, in use behind the runs.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    diagd_version: str
    created: str
    machine: Machine
    model: Model
    start: tuple[Stage, ...]
    runs: tuple[Run, ...]
    skipped: tuple[Skipped, ...]
    peak_memory: int
    device_memory: int = 0

    def write(self, path: Path) -> None:
        """Write as JSON."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def read_report(path: Path) -> Report:
    """Read a report; UsageError: it cannot be read, is no report, or is of a later version."""
    try:
        content = json.loads(read_text(path, "the report"))
        version = content.get("schema_version") if isinstance(content, dict) else None
        if not isinstance(version, int):
            raise ValueError("it has no schema version")
        if version > SCHEMA_VERSION:
            raise UsageError(f"{path} has schema version {version}; this diagd reads up to {SCHEMA_VERSION}")
        return Report.model_validate(_current(content) if version == 1 else content)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # or was made by hand
        reason = fault(error) if isinstance(error, ValidationError) else error
        raise UsageError(f"{path} is no report of diagd-profile: {reason}") from error


def _current(content: dict[str, Any]) -> dict[str, Any]:
    """A report of version 1, which had estimates and optimisations as well, and names that changed."""
    gone = {"ladder", "estimate", "cuts", "subject"}
    model = {"name" if name == "model" else name: value for name, value in content.get("subject", {}).items()}
    runs = [{**run, "first_run": run.get("first_run") or 0.0} for run in content.get("runs", [])]
    rest = {name: value for name, value in content.items() if name not in gone}
    return {**rest, "schema_version": SCHEMA_VERSION, "model": model, "runs": runs}


SLOW_STEPS: Final = 20
SAMPLES: Final = 5000


def summarise(run: Measured, first: float, model: StoredModel, ceilings: Ceilings, fps: float | None) -> Run:
    """Everything a report says of a run; ``first`` are the seconds of one frame as its order's first run."""
    schedule, shown = run.schedule, np.asarray(run.shown)
    intervals = np.diff(shown)
    taken = np.asarray([run.taken(frame) for frame in range(run.frames)])
    steady, behind = float(shown[-1] - shown[0]), _by_width(run.steps[run.chunks + 1 :])
    shown_frames = model.size.pixel_frames * (run.frames - 1)
    slow = slow_ones([step.seconds for step in run.steps], [step.rows for step in run.steps])
    return Run(
        order=name_of(run.decoder),
        k=None if schedule is None else schedule.k,
        d=None if schedule is None else schedule.d,
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
        stages=stages(run.timeline),
        widths=tuple(_width(name, steps, model, ceilings) for name, steps in behind.items()),
        slow_steps=tuple(
            SlowStep(step=index, rows=run.steps[index].rows, seconds=run.steps[index].seconds, usual=usual)
            for index, usual in islice(slow.items(), SLOW_STEPS)
        ),
        samples=tuple(
            StepSample(
                at=step.began - run.began,
                rows=step.rows,
                engine=step.engine,
                sampling=step.sampling,
                host=step.host,
            )
            for step in run.steps[:SAMPLES]
        ),
    )


def stages(timeline: Timeline) -> tuple[Stage, ...]:
    """Its stages in the order of first appearance."""
    return tuple(Stage(name=name, seconds=describe(s)) for name, s in timeline.seconds().items())


def _deadlines(intervals: NDArray[np.float64], fps: float | None) -> Deadlines | None:
    if fps is None:
        return None
    late = intervals - 1 / fps
    worst = float(max(0.0, late.max(initial=0.0)))
    return Deadlines(fps=fps, frames=len(late), missed=int((late > 0).sum()), worst=worst)


def _by_width(steps: Iterable[Timed]) -> dict[str, list[Timed]]:
    """Steps by bucket of their widths, narrow ones first."""
    buckets: dict[str, list[Timed]] = {}
    for step in sorted(steps, key=lambda step: step.rows):
        buckets.setdefault(bucket(step.rows), []).append(step)
    return buckets


def _width(name: str, steps: list[StepTime], model: StoredModel, ceilings: Ceilings) -> Width:
    rows = float(np.mean([step.rows for step in steps]))
    live = float(np.mean([step.live for step in steps]))
    read, operations = model.step_bytes(live), step_operations(model.size, rows, live)
    seconds = describe([step.engine for step in steps])
    return Width(
        name=name,
        steps=len(steps),
        rows=rows,
        seconds=seconds,
        bytes=read,
        operations=operations,
        bandwidth=read / seconds.p50,
        share=step_seconds(read, operations, ceilings.bandwidth, ceilings.peak) / seconds.p50,
        bound="memory" if read / ceilings.bandwidth >= operations / ceilings.peak else "arithmetic",
    )


def slow_ones(seconds: Sequence[float], groups: Sequence[int]) -> dict[int, float]:
    """Times above three medians of their group: these medians by index, the slowest time first.

    Times below 0.1 ms above the median are noise of the clock and the scheduler, and are not reported.
    """
    values, keys = np.asarray(seconds), np.asarray(groups)
    usual = {key: float(np.median(values[keys == key])) for key in np.unique(keys).tolist()}
    slow = [
        n for n in np.argsort(-values).tolist() if values[n] > max(3 * usual[keys[n]], usual[keys[n]] + 1e-4)
    ]
    return {n: usual[keys[n]] for n in slow}


TOLERANCE: Final = 0.03
"""Changes up to this share are not called a regression, however sure they are."""

LEAST_SAMPLES: Final = 8
RESAMPLES: Final = 1000
CONFIDENCE: Final = 0.99


@dataclass(frozen=True)
class Change:
    """Steps of one width bucket of one order: medians, their ratio with its interval, and the verdict.

    ``verdict`` is ``slower``, ``faster``, ``same``, or ``too few`` where there are not enough samples.
    """

    order: str
    width: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All changes, and why the two reports may not be comparable."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> list[Change]:
        """Changes for the worse, beyond noise and tolerance."""
        return [change for change in self.changes if change.verdict == "slower"]


def compare(before: Report, after: Report) -> Comparison:
    """Compare the steps of every order that both reports measured.

    Raises:
        UsageError: they have no order in common.
    """
    later = {run.order: run for run in after.runs}
    pairs = [(run, later[run.order]) for run in before.runs if run.order in later]
    changes = [change for first, second in pairs for change in _changes(first, second)]
    if not changes:
        raise UsageError("the reports have no decoding order in common; profile both with the same --k")
    return Comparison(tuple(changes), tuple(_notes(before, after)))


def _changes(before: Run, after: Run) -> list[Change]:
    measured = ((step for step in run.samples if step.seconds > 0) for run in (before, after))
    first, second = map(_by_width, measured)
    return [_change(before.order, width, first[width], second[width]) for width in first if width in second]


def _change(order: str, width: str, *steps: list[StepSample]) -> Change:
    before, after = ([step.seconds for step in one] for one in steps)
    ratio, low, high = median_ratio(before, after)
    verdict = "same"
    if min(len(before), len(after)) < LEAST_SAMPLES:
        verdict = "too few"
    elif low > 1 and ratio > 1 + TOLERANCE:
        verdict = "slower"
    elif high < 1 and ratio < 1 - TOLERANCE:
        verdict = "faster"
    return Change(order, width, median(before), median(after), ratio, low, high, verdict)


def _notes(before: Report, after: Report) -> list[str]:
    pairs = {
        "model": (before.model.name, after.model.name),
        "precision": (before.model.precision, after.model.precision),
        "engine": (before.model.engine, after.model.engine),
        "window": (before.model.window, after.model.window),
        "processor": (before.machine.processor, after.machine.processor),
        "device": (before.machine.device or "none", after.machine.device or "none"),
        "threads": (before.machine.threads, after.machine.threads),
    }
    return [f"{name} differs: {a} and {b}" for name, (a, b) in pairs.items() if a != b]


def median_ratio(
    before: Sequence[float], after: Sequence[float], seed: int = 0
) -> tuple[float, float, float]:
    """Ratio median(after) / median(before), and the bootstrap interval that holds it with ``CONFIDENCE``.

    The same for the same seed (Efron, 1979).
    """
    random = np.random.default_rng(seed)
    first, second = (
        np.median(np.asarray(values)[random.integers(0, len(values), (RESAMPLES, len(values)))], axis=1)
        for values in (before, after)
    )
    edges = (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE))
    low, high = np.percentile(second / first, edges).tolist()
    return median(after) / median(before), low, high
