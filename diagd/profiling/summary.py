"""A run's times as numbers for a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from diagd.engines.ceilings import Ceilings
from diagd.planning.cost import step_operations, step_seconds
from diagd.planning.model import StoredModel
from diagd.profiling.measure import Measured, bucket
from diagd.profiling.report import Deadlines, Run, SlowStep, Stage, StepSample, Width
from diagd.profiling.statistics import describe, slow_ones
from diagd.profiling.timeline import Timeline
from diagd.runtime.session import StepTime

SLOW_STEPS: Final = 20
SAMPLES: Final = 5000


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
        order=schedule.name,
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
        stages=stages(run.timeline),
        widths=tuple(_widths(run, model, ceilings)),
        slow_steps=tuple(_slow_steps(run.steps)),
        samples=tuple(_samples(run)),
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
    read = model.step_bytes(live)
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
