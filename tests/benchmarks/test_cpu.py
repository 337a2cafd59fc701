"""The CPU benchmark over a small model: what it prints, not how long it took."""

from __future__ import annotations

import re

import numpy as np
import pytest
from rich.console import Console

import benchmarks.cpu as cpu
from benchmarks.cpu import GREEDY, Bench, host, idle_session, streams
from diagd.bundle import Bundle
from diagd.engines.prefix import PrefixEngine
from diagd.runtime.decoders import ScheduledDecoder
from diagd.schedule import Schedule, StreamLayout
from tests.models import export_small
from tests.oracles.models import small_model

LAYOUT = StreamLayout(3, 5, after=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("cpu") / "small.diagd"
    return Bundle.open(export_small(small_model(LAYOUT, layers=1, context_frames=8), path))


def test_the_host_is_timed_over_nothing_and_over_the_engine(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CONSOLE", Console(width=120))
    host(bundle, wall=False, repeats=1)
    printed = capsys.readouterr().out
    for decoding in ("k=1 serial", "k=1 chained", "NTP"):
        row = next(line for line in printed.splitlines() if decoding in line)
        nothing, engine, budget = map(float, re.findall(r"[\d.]+", row.replace(decoding, "")))
        assert nothing > 0 and engine > 0 and budget == 30
    for rule in ("greedy", "temperature 1", "top-k 50", "top-p 0.8"):
        assert f"host, {rule}: " in printed


def test_sessions_are_timed_in_the_same_passes(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CONSOLE", Console(width=120))
    streams(bundle, wall=False, repeats=1)
    printed = capsys.readouterr().out.splitlines()
    for decoding in ("k=1 serial", "NTP"):
        row = next(line for line in printed if decoding in line)
        milliseconds = [float(text) for text in re.findall(r"([\d.]+) \(", row)]
        assert len(milliseconds) == 4 and min(milliseconds) > 0


def test_nothing_runs_behind_the_idle_executor(bundle: Bundle) -> None:
    """All but the steps happens: the frames come, and no cell is ever decoded."""
    session = idle_session(bundle.manifest, 4)
    session.start(np.ones((1, 3, 5), np.int32), np.ones((1, 2), np.int32))
    decoder = ScheduledDecoder(Schedule.chained(LAYOUT, 1))
    frames = list(session.frames(decoder, np.ones((9, 2), np.int32), sampling=GREEDY))
    assert [frame.index for frame in frames] == list(range(1, 10))
    assert sum(frame.steps for frame in frames) == Schedule.chained(LAYOUT, 1).total_steps(9)


def test_a_frame_behind_random_rows_is_timed(bundle: Bundle) -> None:
    bench, ticks = Bench(bundle, 128, wall=False), iter(range(1000))
    schedule = Schedule.serial(LAYOUT, 1)
    assert bench.frame(schedule, 40, lambda: next(ticks)) == schedule.total_steps(1)
    assert isinstance(bench.engine, PrefixEngine)
    assert bench.engine.slot_position[:40].tolist() == list(range(40))
