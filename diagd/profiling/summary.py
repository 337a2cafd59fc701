"""A run's times as numbers for a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagd.engines.ceilings import Ceilings
from diagd.profiling.cost import StoredModel, step_operations, step_seconds
from diagd.profiling.measure import Measured, Timeline, bucket, name_of
from diagd.profiling.report import Deadlines, Run, SlowStep, Stage, StepSample, Width, describe
from diagd.runtime.step import StepTime

SLOW_STEPS: Final = 20
SAMPLES: Final = 5000


def summarise(run: Measured, first: float, model: StoredModel, ceilings: Ceilings, fps: float | None) -> Run:
    """Everything a report says of a run; ``first`` are the seconds of one frame as its order's first run."""
    schedule, shown = run.schedule, np.asarray(run.shown)
    intervals = np.diff(shown)
    taken = np.asarray([run.taken(frame) for frame in range(run.frames)])
    steady = float(shown[-1] - shown[0])
    shown_frames = model.size.pixel_frames * (run.frames - 1)
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
        widths=tuple(_widths(run, model, ceilings)),
        slow_steps=tuple(_slow_steps(run.steps)),
        samples=tuple(_sample(step, run.began) for step in run.steps[:SAMPLES]),
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


def _widths(run: Measured, model: StoredModel, ceilings: Ceilings) -> list[Width]:
    """Buckets of widths behind the prompt, narrow ones first."""
    buckets: dict[str, list[StepTime]] = {}
    for step in sorted(run.steps[run.chunks + 1 :], key=lambda step: step.rows):
        buckets.setdefault(bucket(step.rows), []).append(step)
    return [_width(name, steps, model, ceilings) for name, steps in buckets.items()]


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
    values, keys = np.asarray(seconds, np.float64), np.asarray(groups)
    expected = np.zeros_like(values)
    for key in np.unique(keys):
        expected[keys == key] = np.median(values[keys == key])
    slow = np.flatnonzero((values > 3.0 * expected) & (values > expected + 1e-4))
    return {int(index): float(expected[index]) for index in slow[np.argsort(-values[slow])]}


def _slow_steps(steps: Sequence[StepTime]) -> list[SlowStep]:
    found = slow_ones([step.seconds for step in steps], [step.rows for step in steps])
    return [
        SlowStep(step=index, rows=steps[index].rows, seconds=steps[index].seconds, usual=usual)
        for index, usual in list(found.items())[:SLOW_STEPS]
    ]


def _sample(step: StepTime, began: float) -> StepSample:
    parts = {"engine": step.engine, "sampling": step.sampling, "host": step.host}
    return StepSample(at=step.began - began, rows=step.rows, **parts)
