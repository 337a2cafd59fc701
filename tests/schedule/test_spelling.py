"""The spelling of a schedule: what is written is read again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from diagd.errors import ScheduleError
from diagd.schedule import RowSeed, Schedule, StreamLayout
from tests.schedule.cases import Case, cases

LAYOUT = StreamLayout(9, 12, after=1)


@given(cases())
def test_a_name_is_read_as_what_it_names(case: Case) -> None:
    schedule = case.schedule
    assert Schedule.parse(schedule.name, schedule.layout) == schedule
    assert Schedule.parse(schedule.name.replace(" ", ","), schedule.layout) == schedule


@pytest.mark.parametrize(
    ("spelling", "schedule"),
    [
        ("next token", Schedule.next_token(LAYOUT)),
        ("ntp", Schedule.next_token(LAYOUT)),
        ("ntp seeds=above", replace(Schedule.next_token(LAYOUT), row_seed=RowSeed.ABOVE)),
        ("k=12", Schedule.next_token(LAYOUT)),
        ("k=2", Schedule.serial(LAYOUT, 2)),
        ("k=2 serial", Schedule.serial(LAYOUT, 2)),
        ("k=1,chained", Schedule.chained(LAYOUT, 1)),
        ("chained  k=3", Schedule.chained(LAYOUT, 3)),
        ("k=1 d=15 seeds=above", Schedule(LAYOUT, 1, 15, RowSeed.ABOVE)),
        ("k=1 chained no-refeed keep-seeds", Schedule(LAYOUT, 1, 9, refeed=False, keep_seeds=True)),
    ],
)
def test_spellings(spelling: str, schedule: Schedule) -> None:
    assert Schedule.parse(spelling, LAYOUT) == schedule


def test_what_is_not_said_is_the_default() -> None:
    default = Schedule.chained(LAYOUT, 2, RowSeed.PROMPT)
    assert Schedule.parse("serial", LAYOUT, default) == Schedule.serial(LAYOUT, 2, RowSeed.PROMPT)
    assert Schedule.parse("k=2", LAYOUT, default) == Schedule.serial(LAYOUT, 2, RowSeed.PROMPT)
    assert Schedule.parse("seeds=above", LAYOUT, default) == replace(default, row_seed=RowSeed.ABOVE)


@pytest.mark.parametrize(
    "spelling", ["", " ", "soon", "k=1 k=2", "serial chained", "k=", "k=²", "d=-1", "next", "k=1 seeds=mine"]
)
def test_what_is_no_spelling(spelling: str) -> None:
    with pytest.raises(ScheduleError, match=r"expected 'next token', or k=N with serial, chained or d=N"):
        Schedule.parse(spelling, LAYOUT)


@pytest.mark.parametrize(("spelling", "message"), [("k=0", "k in 1..12"), ("k=1 d=3", r"d in 9 \(chained\)")])
def test_lags_that_cannot_be_decoded(spelling: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(spelling, LAYOUT)
