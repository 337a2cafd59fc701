"""Sizes of buffers and graphs against the tables they must hold."""

from __future__ import annotations

import pytest
from hypothesis import given

from diagd.schedule import Schedule, StreamLayout, default_widths
from tests.schedule.cases import Case, cases


@given(cases())
def test_the_widest_step_is_that_of_a_long_run(case: Case) -> None:
    schedule = case.schedule
    start = schedule.layout.first_cell(2)
    widths = schedule.table(2, 3 * schedule.frames_in_flight, start - 1).widths
    assert schedule.widest_step == widths.max()


@given(cases())
def test_default_widths_take_every_schedule(case: Case) -> None:
    narrow, wide = default_widths(case.schedule.layout)
    assert narrow == 16
    assert wide % 16 == 0
    assert case.schedule.widest_step <= wide


@pytest.mark.parametrize(
    ("layout", "widest", "widths"),
    [
        (StreamLayout(40, 64), 65, (16, 80)),  # a token more than the 64 cells: the refed end of a row
        (StreamLayout(14, 24, before=11), 35, (16, 64)),
    ],
)
def test_chained_frames_fit_the_released_grids(
    layout: StreamLayout, widest: int, widths: tuple[int, int]
) -> None:
    assert Schedule.chained(layout, 1).widest_step == widest
    assert default_widths(layout) == widths
