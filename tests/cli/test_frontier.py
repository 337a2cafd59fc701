"""Schedules as text against the paper's formula."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from diagd.cli.inspect import as_text, steps_of_cells, table_lines
from diagd.schedule import Schedule, StreamLayout

LAYOUT = StreamLayout(3, 4, after=2)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    gap=st.integers(0, 2),
    k=st.integers(1, 5),
    frames=st.integers(1, 3),
    chained=st.booleans(),
)
def test_every_cell_has_the_step_of_the_formula(
    rows: int, columns: int, gap: int, k: int, frames: int, chained: bool
) -> None:
    layout, k = StreamLayout(rows, columns, before=gap), min(k, columns)
    schedule = Schedule.chained(layout, k) if chained else Schedule.serial(layout, k)
    steps = steps_of_cells(schedule.table(1, frames, 0), layout)
    t, i, j = np.indices((frames, rows, columns))
    np.testing.assert_array_equal(steps, t * schedule.d + i * k + j)
    assert steps.max() + 1 == schedule.total_steps(frames)


def test_text_shows_the_diagonal() -> None:
    steps = steps_of_cells(Schedule.serial(LAYOUT, 1).table(1, 1, 0), LAYOUT)
    assert as_text(steps[0]) == "0 1 2 3\n1 2 3 4\n2 3 4 5"


def test_a_step_in_words() -> None:
    schedule = Schedule.serial(LAYOUT, 1)
    lines = table_lines(schedule.table(1, 1, 0), 2)[1:]
    start = LAYOUT.first_cell(1)
    source, stand_in = start - LAYOUT.frame_length + 3, start + 3
    assert lines == [
        f"step 1: 2 rows, 2 cells, 1 seeds: {start}>{start + 1}, {source}@{stand_in}>{stand_in + 1}"
    ]
