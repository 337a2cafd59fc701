"""Step counts and frontier widths of the published grids, and the lags that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from diagd.errors import ScheduleError
from diagd.schedule import NO_SINK, RowSeed, Schedule, StreamLayout
from tests.schedule.cases import Case, cases

COSMOS = StreamLayout(40, 64)
MINEWORLD = StreamLayout(14, 24, after=11)
WHAM = StreamLayout(18, 30, after=16)


def queries(schedule: Schedule, frames: int) -> np.ndarray:
    """Cells decoded by each step."""
    table = schedule.table(1, frames, schedule.layout.first_cell(1) - 1)
    return np.array([(table.step(n).sinks != NO_SINK).sum() for n in range(table.steps)])


@pytest.mark.parametrize(
    ("layout", "frames", "k", "d", "steps", "width"),
    [
        (COSMOS, 3, 64, 2560, 7680, 1),
        (COSMOS, 3, 1, 103, 309, 40),
        (COSMOS, 3, 1, 40, 183, 64),
        (COSMOS, 3, 2, 142, 426, 32),
        (COSMOS, 3, 2, 80, 302, 32),
        (COSMOS, 3, 3, 120, 421, 22),
        (COSMOS, 3, 4, 160, 540, 16),
        (COSMOS, 4, 1, 103, 412, 40),
        (COSMOS, 4, 1, 40, 223, 64),
        (COSMOS, 4, 2, 80, 382, 32),
        (MINEWORLD, 1, 24, 336, 336, 1),
        (MINEWORLD, 1, 1, 37, 37, 14),
        (MINEWORLD, 1, 2, 50, 50, 12),
        (MINEWORLD, 1, 4, 76, 76, 6),
        (MINEWORLD, 15, 24, 336, 5040, 1),
        (MINEWORLD, 15, 1, 37, 555, 14),
        (MINEWORLD, 15, 1, 14, 233, 24),
        (MINEWORLD, 15, 2, 28, 442, 12),
        (MINEWORLD, 15, 4, 56, 860, 6),
        (WHAM, 1, 30, 540, 540, 1),
        (WHAM, 1, 1, 47, 47, 18),
        (WHAM, 1, 2, 64, 64, 15),
        (WHAM, 1, 4, 98, 98, 8),
    ],
)
def test_published_steps_and_widths(
    layout: StreamLayout, frames: int, k: int, d: int, steps: int, width: int
) -> None:
    schedule = Schedule(layout, k, d)
    counts = queries(schedule, frames)
    assert len(counts) == steps == schedule.total_steps(frames)
    assert counts.max() == width
    assert counts.sum() == frames * layout.cells


@pytest.mark.parametrize(
    ("k", "serial", "chained"),
    [(1, (14, 37 * 2), (25, 51)), (2, (12, 50 * 2), (22, 78)), (4, (12, 76 * 2), (16, 132))],
)
def test_fed_tokens_of_the_released_schedules(
    k: int, serial: tuple[int, int], chained: tuple[int, int]
) -> None:
    """Inputs per call and calls of two MineWorld frames, traced in the released code (prompt call aside)."""
    start = MINEWORLD.first_cell(1) - 1
    for d, expected in ((24 + 13 * k, serial), (14 * k, chained)):
        table = Schedule(MINEWORLD, k, d, RowSeed.PROMPT, refeed=False, keep_seeds=True).table(1, 2, start)
        assert (table.widths.max(), table.steps) == expected


@settings(max_examples=200)
@given(cases())
def test_step_counts_equal_enumeration(case: Case) -> None:
    schedule, layout = case.schedule, case.schedule.layout
    last = max(
        t * schedule.d + i * schedule.k + j
        for t in range(case.frames)
        for i in range(layout.rows)
        for j in range(layout.columns)
    )
    assert case.table().steps == schedule.total_steps(case.frames) == last + 1
    assert schedule.total_steps(0) == 0
    assert schedule.total_steps(1) == schedule.steps_per_frame
    assert len(queries(schedule, case.frames)) == last + 1


@pytest.mark.parametrize("k", [1, 2, 5])
def test_named_schedules(k: int) -> None:
    layout = StreamLayout(3, 5, after=1)
    assert Schedule.serial(layout, k).d == layout.steps_per_frame(k) == 5 + 2 * k
    assert Schedule.chained(layout, k).d == layout.chained_lag(k) == 3 * k
    ntp = Schedule.next_token(layout)
    assert (ntp.k, ntp.d) == (5, 15) == (Schedule.chained(layout, 5).k, Schedule.serial(layout, 5).d)


@pytest.mark.parametrize(
    ("k", "d", "reason"),
    [
        (0, 5, r"k=0 is outside 1\.\.5"),
        (6, 15, r"k=6 is outside 1\.\.5"),
        (2, 5, r"d=5 is below k\*rows = 6.*choose d in 6"),
        (2, 10, r"d=10 is above the 9 steps.*\.\. 9 \(serial\)"),
    ],
)
def test_illegal_lags_are_refused_with_the_reason(k: int, d: int, reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        Schedule(StreamLayout(3, 5), k, d)


def test_kept_seeds_cannot_be_refed() -> None:
    with pytest.raises(ScheduleError, match="refeed=False or keep_seeds=False"):
        Schedule(StreamLayout(3, 5), 1, 3, refeed=True, keep_seeds=True)


@pytest.mark.parametrize("sizes", [(0, 3, 0, 0, 0), (3, 0, 0, 0, 0), (1, 1, -1, 0, 0), (1, 1, 0, 0, -2)])
def test_impossible_layouts_are_refused(sizes: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ScheduleError):
        StreamLayout(*sizes)


def test_prefix_tokens_are_counted() -> None:
    layout = StreamLayout(2, 3, prefix_tokens=(7, 9), after=1)
    assert (layout.prefix, layout.frame_start(1)) == (2, 9)
    assert layout == StreamLayout(2, 3, 2, after=1, prefix_tokens=(7, 9))
    with pytest.raises(ScheduleError, match="prefix=1 and 2 prefix_tokens"):
        StreamLayout(2, 3, prefix=1, prefix_tokens=(7, 9))
