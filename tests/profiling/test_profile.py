"""Profiles of a real bundle: figures add up, and what happened is found."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle, Form
from diagd.engines.ceilings import Ceilings
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import PrefixEngine
from diagd.errors import ScheduleError, UsageError
from diagd.export.options import GraphOptions
from diagd.profiling import measure as measuring
from diagd.profiling.cost import read_model
from diagd.profiling.measure import bucket, measure, random_workload
from diagd.profiling.page import page
from diagd.profiling.profile import Profile, ProfileOptions, profile
from diagd.profiling.report import Run, summarise
from diagd.progress import Progress
from diagd.runtime.decoders import ScheduledDecoder
from diagd.runtime.load import session_over, step_options
from diagd.schedule import Schedule
from tests.models import export_small
from tests.oracles.models import small_model
from tests.profiling.conftest import LAYOUT, Clock

CPU = CpuOptions(threads=1)
CEILINGS = Ceilings(copied=1e10, read=1e10, peak=1e11, threads=1)


def test_stages_add_up_to_the_wall_time(profiled: Profile) -> None:
    """None counts twice, and nothing is left out."""
    for run in profiled.report.runs:
        assert sum(stage.seconds.total for stage in run.stages) == pytest.approx(run.wall, rel=1e-6)


def test_orders_and_passes_are_those_of_the_schedules(profiled: Profile) -> None:
    runs = {run.order: run for run in profiled.report.runs}
    assert list(runs) == ["next token", "k=1 serial", "k=1 chained", "k=2 serial", "k=2 chained"]
    assert runs["next token"].passes == 2 * LAYOUT.cells
    for name, schedule in (
        ("k=1 serial", Schedule.serial(LAYOUT, 1)),
        ("k=2 chained", Schedule.chained(LAYOUT, 2)),
    ):
        assert runs[name].passes == schedule.total_steps(6)
        assert runs[name].frames == 6


def test_times_of_a_run_agree_with_each_other(profiled: Profile) -> None:
    for run, measured in zip(profiled.report.runs, profiled.runs, strict=True):
        gaps = np.diff(measured.shown)
        assert run.intervals.p50 == pytest.approx(float(np.percentile(gaps, 50)))
        assert run.frames_per_second == pytest.approx(1 / gaps.mean())
        assert 0 < run.time_to_first_frame <= run.wall
        assert run.action_latency.p50 < run.action_latency_worst.p50
        assert sum(width.steps for width in run.widths) == run.passes - measured.chunks - 1
        assert len(run.samples) == run.passes


def test_an_action_appears_when_its_frame_is_done(profiled: Profile) -> None:
    """Serial frames: an action waits for its own frame only; chained ones overlap."""
    for measured in profiled.runs:
        schedule = measured.schedule
        assert schedule is not None
        for frame in range(1, measured.frames):
            first = measured.chunks + frame * schedule.d
            last = measured.steps[first + schedule.steps_per_frame - 1]
            ended = last.began + last.engine + last.sampling + last.host
            assert measured.taken(frame) == measured.steps[first].began
            assert ended <= measured.decoded[frame]
            assert (
                frame + 1 >= measured.frames or ended < measured.steps[first + schedule.steps_per_frame].began
            )


class Slowed(PrefixEngine):
    """Takes long for one of its steps."""

    left, watch = -1, Clock()

    def step(self, lanes: Sequence[int] = (0,)) -> None:
        if self.left == 0:
            self.watch.added += 0.251
        self.left -= 1
        super().step(lanes)


def slowed(bundle: Bundle, clock: Clock, step: int, fps: float) -> Run:
    options, frames = step_options(bundle.manifest, 4, cpu=CPU), 4
    engine = Slowed(bundle, options)
    session = session_over(bundle, engine, 4, CPU)
    workload = random_workload(session, 2, frames)
    schedule = Schedule.serial(LAYOUT, 1)
    measure(session, ScheduledDecoder(schedule), workload, 1)
    engine.left, engine.watch = step, clock
    run = measure(session, ScheduledDecoder(schedule), workload, frames)
    return summarise(run, 0.0, read_model(bundle), CEILINGS, fps)


def test_a_planted_slow_step_is_found(bundle: Bundle, clock: Clock) -> None:
    run = slowed(bundle, clock, step=20, fps=5.0)
    worst = run.slow_steps[0]
    assert worst.step == 20
    assert worst.seconds > 0.25 > 10 * worst.usual
    assert run.deadlines is not None
    assert (run.deadlines.missed, run.deadlines.frames) == (1, 3)
    assert run.deadlines.worst > 0.05
    assert max(sample.engine for sample in run.samples) == run.samples[20].engine


def test_bytes_and_operations_are_the_formula(bundle: Bundle, profiled: Profile) -> None:
    model, run, measured = read_model(bundle), profiled.report.runs[0], profiled.runs[0]
    ones = [step for step in measured.steps[measured.chunks + 1 :] if step.rows == 1]
    width = run.widths[0]
    assert (width.name, width.steps) == ("w=1", len(ones))
    live = np.mean([step.live for step in ones])
    cache = 2 * 2 * 2 * 8 * 4 * live  # K and V, two layers, two heads of eight, float32
    assert width.bytes == pytest.approx(model.streamed_bytes + cache)
    assert width.bandwidth == pytest.approx(width.bytes / width.seconds.p50)
    assert width.share > 0


def test_a_full_window_is_the_steady_state(profiled: Profile) -> None:
    """With the window full from the start, no step works on more slots than the first ones."""
    for measured in profiled.runs:
        live = [step.live for step in measured.steps]
        assert min(live) >= (profiled.report.model.window - 1) * LAYOUT.frame_length


def test_widths_are_in_buckets() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 64)] == [
        *("w=1", "w=2", "w=3-4", "w=3-4", "w=5-8", "w=5-8", "w=9-16", "w=33-64")
    ]


def test_what_cannot_be_profiled_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ScheduleError, match="k=7"):
        profile(bundle, ProfileOptions(ks=(7,)))
    with pytest.raises(UsageError, match="two or more"):
        profile(bundle, replace(ProfileOptions(), frames=1))


def test_limits_and_steps_have_the_same_threads(bundle: Bundle) -> None:
    """A small model decodes on one thread; what two threads could do is not its limit."""
    report = profile(bundle, ProfileOptions(ks=(1,), frames=2)).report
    assert report.machine.threads == 1


def test_an_engine_too_narrow_for_any_order_is_told(tmp_path: Path) -> None:
    """The first step of a frame feeds its action as well."""
    options = GraphOptions((Form.MODERN,), widths=(1,))
    narrow = Bundle.open(
        export_small(small_model(LAYOUT, layers=1, context_frames=4), tmp_path / "n.diagd", options)
    )
    told = "no decoding order can be measured; next token: a step of k=6, d=24 feeds 2 tokens"
    with pytest.raises(UsageError, match=told):
        profile(narrow, ProfileOptions(ks=(1,), frames=2, cpu=CPU))


def test_a_trace_nests_and_adds_up(profiled: Profile, tmp_path: Path) -> None:
    names = [run_.order for run_ in profiled.report.runs]
    events = [event for event in profiled.trace_events() if event["ph"] == "X"]
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in events)
    for thread, name in enumerate(names, start=1):
        whole, *parts = [event for event in events if event["tid"] == thread]
        assert whole["name"] == name
        for part in parts:
            assert whole["ts"] - 1 <= part["ts"]
            assert part["ts"] + part["dur"] <= whole["ts"] + whole["dur"] + 1
        engine = [part for part in parts if part["name"].startswith(("steps", "prefill"))]
        assert len(engine) == profiled.report.runs[thread - 1].passes
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for a, b in itertools.pairwise(engine))
    profiled.write_trace(tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())
    assert len(content["traceEvents"]) == len(events) + len(names) + 1


def test_a_spent_budget_leaves_orders_out(bundle: Bundle) -> None:
    """The quickest order is measured in any case."""
    options = ProfileOptions(ks=(1,), frames=4, budget=1e-3, cpu=CPU)
    report = profile(bundle, options).report
    assert [(run.order, run.frames) for run in report.runs] == [("k=1 chained", 4)]
    assert [skipped.order for skipped in report.skipped] == ["next token", "k=1 serial"]
    assert all("0.001 s of the budget" in skipped.reason for skipped in report.skipped)
    for skipped in report.skipped:
        assert f"{skipped.order}: {skipped.reason}" in page(report)


def test_a_large_budget_changes_nothing(bundle: Bundle) -> None:
    options = ProfileOptions(ks=(1,), frames=3, budget=1e6, cpu=CPU)
    report = profile(bundle, options).report
    assert report.skipped == ()
    assert [run.frames for run in report.runs] == [2, 3, 3]


class Bars(Progress):
    """Keeps what bars were made and how far they got."""

    def __init__(self) -> None:
        super().__init__()
        self.bars: list[tuple[str, int, list[int]]] = []

    @contextmanager
    def count(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        moves: list[int] = []
        self.bars.append((title, total, moves))
        yield moves.append


def test_progress_is_shown_inside_an_order(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of the cold frame and of the measured ones, in more than one go."""
    monkeypatch.setattr(measuring, "SECONDS", 0.002)
    shown = Bars()
    report = profile(bundle, ProfileOptions(ks=(1,), frames=4, cpu=CPU), shown).report
    assert [title for title, _, _ in shown.bars] == [
        "k=1 chained, 1 + 4 frames, 1 of 3 orders",
        "k=1 serial, 1 + 4 frames, 2 of 3 orders",
        "next token, 1 + 2 frames, 3 of 3 orders",
    ]
    for (_, total, moves), run in zip(shown.bars, reversed(report.runs), strict=True):
        assert sum(moves) == total > run.passes
    assert sum(move > 0 for move in shown.bars[2][2]) > 2
