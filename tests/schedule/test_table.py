"""Every table equals the brute-force simulation, and has the properties that decoding rests on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagd.errors import ScheduleError
from diagd.schedule import NO_SINK, RowSeed, Schedule, StreamLayout, shifted
from tests.oracles.rows import rows_of
from tests.oracles.simulator import split_first_pass
from tests.oracles.tables import check_table
from tests.schedule.cases import Case, cases, layouts

BUDGET = settings(max_examples=300)


@BUDGET
@given(cases())
def test_table_equals_brute_force(case: Case) -> None:
    assert rows_of(case.table()) == list(case.simulator().steps())
    check_table(case.table(), case.schedule)


def test_tables_with_faults_are_refused() -> None:
    layout = StreamLayout(4, 6, after=1)
    schedule = Schedule.chained(layout, 1)
    table = schedule.table(1, 2, 0)
    check_table(table, schedule)
    decoding = np.flatnonzero(table.sinks >= 0)
    twice = table.sinks.copy()
    twice[decoding[5]] = twice[decoding[4]]
    with pytest.raises(ScheduleError, match="again"):
        check_table(replace(table, sinks=twice), schedule)
    missing = table.sinks.copy()
    missing[decoding[-1]] = -1
    with pytest.raises(ScheduleError, match=f"{2 * layout.cells - 1} of {2 * layout.cells}"):
        check_table(replace(table, sinks=missing), schedule)
    early = table.sources.copy()
    early[decoding[1]] = table.sinks[decoding[-1]]
    with pytest.raises(ScheduleError, match="too early"):
        check_table(replace(table, sources=early), schedule)


@BUDGET
@given(cases(), st.integers(1, 12))
def test_long_prompts_are_fed_in_chunks(case: Case, max_width: int) -> None:
    table = case.table(max_width)
    assert rows_of(table) == split_first_pass(list(case.simulator().steps()), max_width)
    check_table(table, case.schedule)
    chunks = table.steps - case.table().steps
    assert (table.widths[: chunks + 1] <= max_width).all()
    assert (table.frame_starts == case.table().frame_starts + chunks).all()


@BUDGET
@given(cases(), st.integers(0, 10**12))
def test_the_shape_says_what_decodes_and_whose_slots_change(case: Case, by: int) -> None:
    table = case.table()
    shape, guesses, first = table.shape, list[int](), 0
    changed = np.split(shape.changed, shape.changes[1:-1])
    hides = np.isin(np.arange(len(shape.changed)), shape.hides)
    decoded = np.split(shape.decoded, shape.draws[1:-1])
    for number, width in enumerate(shape.widths.tolist()):
        step, own = table.step(number), list(range(first, first + width))
        assert changed[number].tolist() == guesses + own
        hidden = hides[shape.changes[number] : shape.changes[number + 1]]
        assert hidden.tolist() == [True] * len(guesses) + [False] * width
        assert decoded[number].tolist() == np.flatnonzero(step.sinks != NO_SINK).tolist()
        guesses, first = [row for row in own if table.transient[row]], first + width
    assert shape.last_guesses.tolist() == guesses
    assert shape.decoding.tolist() == np.flatnonzero(table.sinks != NO_SINK).tolist()
    moved = shifted(table, by)
    assert moved.shape is shape
    assert (moved.positions == table.positions.astype(np.int64) + by).all()
    assert (np.flatnonzero(moved.sinks != NO_SINK) == shape.decoding).all()
    assert (moved.sinks[shape.decoding] == table.sinks[shape.decoding].astype(np.int64) + by).all()


@BUDGET
@given(cases())
def test_every_cell_is_decoded_once_at_its_step(case: Case) -> None:
    table, layout = case.table(), case.schedule.layout
    decoded_at: dict[int, int] = {}
    for number, rows in enumerate(rows_of(table)):
        for row in rows:
            if row.sink != NO_SINK:
                assert row.position == row.sink - 1
                assert row.sink not in decoded_at
                decoded_at[row.sink] = number
    expected = {
        layout.cell(case.first_frame + t, i, j): t * case.schedule.d + i * case.schedule.k + j
        for t in range(case.frames)
        for i in range(layout.rows)
        for j in range(layout.columns)
    }
    assert decoded_at == expected
    for t in range(case.frames):
        frame = [decoded_at[layout.first_cell(case.first_frame + t) + c] for c in range(layout.cells)]
        start = table.frame_starts[t]
        assert (min(frame), max(frame)) == (start, start + case.schedule.steps_per_frame - 1)


@BUDGET
@given(cases())
def test_no_row_reads_an_undecoded_cell(case: Case) -> None:
    layout = case.schedule.layout
    undecoded = {
        layout.first_cell(case.first_frame + t) + c for t in range(case.frames) for c in range(layout.cells)
    }
    for rows in rows_of(case.table()):
        assert not undecoded.intersection(row.source for row in rows)
        undecoded -= {row.sink for row in rows}
    assert not undecoded


@BUDGET
@given(cases())
def test_seeds_stand_only_for_undecoded_predecessors(case: Case) -> None:
    layout = case.schedule.layout
    undecoded = {
        layout.first_cell(case.first_frame + t) + c for t in range(case.frames) for c in range(layout.cells)
    }
    seeds = 0
    for rows in rows_of(case.table()):
        for row in rows:
            is_seed = row.source != row.position
            assert is_seed == (row.position in undecoded)
            if is_seed:
                seeds += 1
                offset = (row.sink - layout.first_cell(0)) % layout.frame_length
                assert offset % layout.columns == 0
        undecoded -= {row.sink for row in rows}
    inside_frames = layout.rows - 1 if case.schedule.k < layout.columns else 0
    at_frame_starts = layout.gap == 0 and case.schedule.d < case.schedule.steps_per_frame
    assert seeds == inside_frames * case.frames + at_frame_starts * (case.frames - 1)


@BUDGET
@given(cases())
def test_no_row_sees_a_guess_within_its_step(case: Case) -> None:
    """Rows see smaller or equal positions, so a seed must stand at the largest position of its step."""
    for rows in rows_of(case.table()):
        positions = [row.position for row in rows]
        assert positions == sorted(set(positions))
        seeds = [row.position for row in rows if row.source != row.position]
        assert len(seeds) <= 1
        assert all(position <= seed for seed in seeds for position in positions)


@BUDGET
@given(cases())
def test_each_position_is_fed_once(case: Case) -> None:
    """A true token is fed at most once, a seed never after it; with refeed nothing but the end is missing."""
    truly_fed = list(range(case.fed))
    for rows in rows_of(case.table()):
        for row in rows:
            assert row.position not in truly_fed
            if row.source == row.position:
                truly_fed.append(row.position)
    assert len(truly_fed) == len(set(truly_fed))
    if case.schedule.refeed:
        layout = case.schedule.layout
        end = layout.cell(case.first_frame + case.frames - 1, layout.rows - 1, layout.columns - 1)
        table = case.table()
        last = set(table.step(table.steps - 1).sinks.tolist())
        assert end in last
        assert set(range(end + 1)) - set(truly_fed) == last - {NO_SINK}


@BUDGET
@given(layouts(), st.integers(1, 4), st.sampled_from(RowSeed), st.booleans())
def test_raster_order_when_lags_are_whole_rows_and_frames(
    layout: StreamLayout, frames: int, row_seed: RowSeed, refeed: bool
) -> None:
    schedule = Schedule(layout, layout.columns, layout.cells, row_seed, refeed)
    start = layout.first_cell(1)
    table = schedule.table(1, frames, start - 1)
    np.testing.assert_array_equal(table.sources, table.positions)
    np.testing.assert_array_equal(table.positions, np.arange(start - 1, start - 1 + len(table.positions)))
    sinks = [layout.first_cell(1 + t) + c for t in range(frames) for c in range(layout.cells)]
    assert table.sinks[table.sinks != NO_SINK].tolist() == sinks
    first_cells = np.isin(np.arange(table.steps), table.frame_starts[1:])
    np.testing.assert_array_equal(table.widths, np.where(first_cells, 1 + layout.gap, 1))
    if refeed:
        assert rows_of(Schedule.next_token(layout).table(1, frames, start - 1)) == rows_of(table)


def test_arrays_are_contiguous_int32() -> None:
    table = Schedule.chained(StreamLayout(3, 5, after=2), k=1).table(1, 3, 0)
    for array in (table.offsets, table.sources, table.positions, table.sinks, table.frame_starts):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
    assert table.step(2).width == table.widths[2]


@pytest.mark.parametrize(("first_frame", "frames", "fed"), [(0, 1, 0), (1, 0, 0), (1, 1, 8), (1, 1, -1)])
def test_impossible_runs_are_refused(first_frame: int, frames: int, fed: int) -> None:
    schedule = Schedule.serial(StreamLayout(2, 3, after=2), k=1)
    assert schedule.table(1, 1, 7).steps == 4
    with pytest.raises(ScheduleError, match=r"expected 0\.\.7" if frames and first_frame else "prompt"):
        schedule.table(first_frame, frames, fed)


def test_empty_passes_are_refused() -> None:
    with pytest.raises(ScheduleError, match="max_width=0"):
        Schedule.serial(StreamLayout(2, 3), k=1).table(1, 1, 0, max_width=0)
