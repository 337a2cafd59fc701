"""Pictures of schedules against the paper's formula."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagd.errors import UsageError
from diagd.profiling.frontier import animation, as_text, draw, frontier, still, table_lines, write_png
from diagd.runtime.video import read_frames
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
    drawn = frontier(schedule, frames)
    t, i, j = np.indices((frames, rows, columns))
    np.testing.assert_array_equal(drawn.steps, t * schedule.d + i * k + j)
    assert drawn.last + 1 == schedule.total_steps(frames)


def test_text_shows_the_diagonal() -> None:
    assert as_text(frontier(Schedule.serial(LAYOUT, 1), 1).steps[0]) == "0 1 2 3\n1 2 3 4\n2 3 4 5"


def test_a_step_in_words() -> None:
    schedule = Schedule.serial(LAYOUT, 1)
    lines = table_lines(schedule.table(1, 1, 0), 1, 1)
    start = LAYOUT.first_cell(1)
    source, stand_in = start - LAYOUT.frame_length + 3, start + 3
    assert lines == [
        f"step 1: 2 rows, 2 cells, 1 seeds: {start}>{start + 1}, {source}@{stand_in}>{stand_in + 1}"
    ]


def test_each_picture_of_the_animation_lights_its_frontier(tmp_path: Path) -> None:
    drawn = frontier(Schedule.chained(LAYOUT, 2), 2)
    pictures = animation(drawn)
    assert len(pictures) == drawn.last + 1
    bright = [(picture == pictures[0].reshape(-1, 3).max(axis=0)).all(axis=-1).sum() for picture in pictures]
    cells = np.bincount(drawn.steps.ravel())
    assert [count // bright[0] for count in bright] == list(cells)
    draw(tmp_path / "f.gif", drawn)
    assert len(read_frames(tmp_path / "f.gif")) >= len(pictures)


def test_a_png_reads_back_exactly(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    write_png(tmp_path / "p.png", pixels)
    with av.open(str(tmp_path / "p.png")) as file:
        read = next(file.decode(video=0)).to_ndarray(format="rgb24")
    np.testing.assert_array_equal(read, pixels)
    drawn = frontier(Schedule.serial(LAYOUT, 1), 1)
    draw(tmp_path / "f.png", drawn)
    assert still(drawn).shape[0] % 2 == 0


def test_other_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.gif or \.png"):
        draw(tmp_path / "f.jpg", frontier(Schedule.serial(LAYOUT, 1), 1))
