"""Reports made by hand, with times that are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diagd.profiling.report import Machine, Model, Report, Run, Stage, StepSample, Width, describe


def lognormal(median: float, seed: int, count: int = 60) -> list[float]:
    return list(np.random.default_rng(seed).lognormal(np.log(median), 0.05, count))


def run(order: str, seconds: Sequence[float], rows: int = 4) -> Run:
    times = describe(seconds)
    samples = tuple(
        StepSample(at=float(index), rows=rows, engine=value, sampling=0, host=0)
        for index, value in enumerate(seconds)
    )
    width = Width(
        name=f"w={rows}",
        steps=len(seconds),
        rows=rows,
        seconds=times,
        bytes=1e6,
        operations=8e6,
        bandwidth=1e6 / times.p50,
        share=0.5,
        bound="memory",
    )
    return Run(
        order=order,
        k=1,
        d=4,
        frames=4,
        passes=len(seconds),
        first_run=0.5,
        time_to_first_frame=0.1,
        wall=times.total,
        frames_per_second=1 / times.mean,
        intervals=times,
        action_latency=times,
        action_latency_worst=times,
        deadlines=None,
        stages=(Stage(name="steps w=4", seconds=times),),
        widths=(width,),
        slow_steps=(),
        samples=samples,
    )


def report(*runs: Run, processor: str = "test") -> Report:
    return Report(
        diagd_version="0",
        created="2000-01-01T00:00:00+00:00",
        machine=Machine(
            processor=processor,
            cores=1,
            threads=1,
            memory=1 << 30,
            platform="test",
            versions={},
            copied=1e10,
            read=2e10,
            peak=1e11,
        ),
        model=Model(
            name="m <b>",
            digest="0",
            precision="fp32",
            engine="E",
            window=4,
            parameters=1,
            weight_bytes=4,
        ),
        start=(),
        runs=runs,
        skipped=(),
        peak_memory=1,
    )
