"""The ring of slots against a plain list of rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagd.engines.engine import VOID
from diagd.runtime.decoders.scheduled import ScheduledDecoder
from diagd.runtime.slots import SlotOverflowError, SlotRing, SlotUpdates
from diagd.runtime.stream import Stream
from diagd.schedule import Schedule, Shape, StreamLayout, slots_in_sight, slots_needed


def append(
    ring: SlotRing, *steps: list[int], padded: list[int] | None = None, transient: list[int] | None = None
) -> SlotUpdates:
    """Append a block of steps, whose rows stand at these positions."""
    positions = np.array([position for step in steps for position in step], np.int32)
    offsets = np.cumsum([0, *map(len, steps)])
    hidden = np.isin(np.arange(len(positions)), transient or [])
    shape = Shape.of(offsets, np.zeros(len(positions), np.bool_), hidden)
    return ring.append(positions, shape, np.array(padded or [len(s) for s in steps], np.int32))


def replayed(slots: np.ndarray, updates: SlotUpdates) -> list[np.ndarray]:
    """What an engine holds as it runs the steps, each time ahead of the step's own graph."""
    seen = []
    for first, last in zip(updates.offsets, updates.offsets[1:], strict=False):
        changed = updates.slots[first:last]
        assert len(set(changed.tolist())) == len(changed)  # a device writes them in no order
        slots[changed] = updates.positions[first:last]
        seen.append(slots.copy())
    return seen


@given(st.lists(st.integers(1, 6), min_size=1, max_size=60), st.integers(12, 40))
def test_live_rows_are_never_overwritten(widths: list[int], keep: int) -> None:
    """Rows stay visible until they are evicted, wherever the ring wraps."""
    ring = SlotRing(keep + 14)
    position, live = 0, list[int]()
    for width in widths:
        oldest = max(0, position + width - keep)
        ring.evict(0, oldest)
        (start,) = append(ring, list(range(position, position + width))).write_index
        live = [p for p in live if p >= oldest] + list(range(position, position + width))
        assert start + width <= len(ring.slot_position)
        held = ring.slot_position[ring.slot_position != VOID]
        assert sorted(held.tolist()) == live
        assert (ring.slot_position[ring.live :] == VOID).all()
        position += width


def test_full_rings_refuse_instead_of_overwriting() -> None:
    ring = SlotRing(8)
    append(ring, list(range(6)))
    with pytest.raises(SlotOverflowError, match="larger window"):
        append(ring, list(range(6, 10)))


def test_blocks_longer_than_the_ring_are_refused() -> None:
    """Even where the slots are void when the block begins: its own rows would be overwritten."""
    with pytest.raises(SlotOverflowError, match="larger window"):
        append(SlotRing(8), [0, 1, 2], [3, 4, 5], [6, 7, 8])


def test_pad_rows_are_void_and_written_again() -> None:
    ring = SlotRing(8)
    assert append(ring, [0, 1], [2], padded=[4, 4]).write_index.tolist() == [0, 2]
    assert ring.slot_position.tolist() == [0, 1, 2] + [VOID] * 5


def test_seeds_are_hidden_after_their_step() -> None:
    ring, engine = SlotRing(8), np.full(8, VOID, np.int32)
    seen = replayed(engine, append(ring, [0, 1, 2], [3], [4, 5], transient=[1, 5]))
    assert [state[:3].tolist() for state in seen] == [[0, 1, 2], [0, VOID, 2], [0, VOID, 2]]
    assert seen[2][:6].tolist() == [0, VOID, 2, 3, 4, 5]
    assert ring.slot_position[:6].tolist() == [0, VOID, 2, 3, 4, VOID]
    assert replayed(engine, append(ring, [6]))[0][:7].tolist() == [0, VOID, 2, 3, 4, VOID, 6]


@given(st.data())
def test_an_engine_told_of_the_updates_holds_what_the_ring_holds(data: st.DataObject) -> None:
    """Blocks of any steps, guesses, evictions and rewinds: no slot is found by comparing."""
    ring, position = SlotRing(40), 0
    engine = ring.slot_position.copy()
    for _ in range(data.draw(st.integers(1, 12))):
        widths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        ring.evict(0, max(0, position + sum(widths) - 20))
        steps = []
        for width in widths:
            steps.append(list(range(position, position + width)))
            position += width
        guesses = data.draw(st.lists(st.integers(0, sum(widths) - 1), max_size=2))
        for state in replayed(engine, append(ring, *steps, transient=guesses)):
            assert set(state[state != VOID].tolist()) <= set(range(position))
        if data.draw(st.booleans()):
            position -= data.draw(st.integers(0, min(position, 8)))
            ring.rewind(position)
            assert (ring.slot_position[ring.write_index :][:1] == VOID).all()
    final = replayed(engine, append(ring, [position]))[0]
    np.testing.assert_array_equal(final, ring.slot_position)


def test_rows_given_back_are_written_again() -> None:
    ring = SlotRing(8)
    append(ring, [0, 1, 2, 3, 4])
    ring.rewind(2)
    assert ring.slot_position[:5].tolist() == [0, 1, VOID, VOID, VOID]
    assert append(ring, [2, 3]).write_index.tolist() == [2]
    ring.rewind(5)
    assert ring.slot_position[:5].tolist() == [0, 1, 2, 3, VOID]


def test_rewinding_gives_back_rows_across_the_end_of_the_ring() -> None:
    ring = SlotRing(8)
    append(ring, [0, 1, 2, 3])
    ring.evict(0, 2)
    append(ring, [4, 5, 6])
    ring.evict(2, 4)
    append(ring, [7, 8])
    assert ring.slot_position.tolist() == [7, 8, VOID, VOID, 4, 5, 6, VOID]
    ring.rewind(6)
    assert ring.write_index == 6
    assert append(ring, [6, 7], [8, 9]).write_index.tolist() == [6, 0]


def test_zero_rows_are_visible_until_the_real_row_is_written() -> None:
    ring = SlotRing(12, zero_rows=(0, 4))
    engine = ring.slot_position.copy()
    updates = append(ring, [1], [3])
    assert updates.write_index.tolist() == [4, 5]
    assert replayed(engine, updates)[0][:5].tolist() == [0, VOID, 2, 3, 1]
    assert ring.slot_position[:6].tolist() == [0, VOID, 2, VOID, 1, 3]
    ring.evict(0, 12)
    assert ring.slot_position[:6].tolist() == [0, VOID, 2, VOID, VOID, VOID]


def test_zero_rows_come_back_with_a_rewind() -> None:
    ring = SlotRing(12, zero_rows=(0, 4))
    append(ring, [1, 3])
    ring.rewind(2)
    assert ring.slot_position[:6].tolist() == [0, VOID, 2, 3, 1, VOID]
    assert ring.stale


def test_positions_are_counted_from_the_base() -> None:
    ring = SlotRing(6)
    append(ring, [4, 5])
    ring.rebase(4)
    assert ring.slot_position[:2].tolist() == [0, 1]
    ring.evict(0, 5)
    assert ring.slot_position[:2].tolist() == [VOID, 1]


def test_a_prefix_stays_ahead_of_all_however_far_the_base_is() -> None:
    ring = SlotRing(6)
    append(ring, [0, 1])
    ring.rebase(1 << 40, prefix=2)
    append(ring, [2, 3])
    ring.evict(2, (1 << 40) + 3)
    assert ring.slot_position[:4].tolist() == [0, 1, VOID, 3]
    ring.rewind((1 << 40) + 3)
    assert ring.slot_position[:4].tolist() == [0, 1, VOID, VOID]


@given(st.lists(st.integers(1, 9), min_size=3, max_size=12), st.integers(3, 5), st.booleans())
def test_overlapping_frames_find_slots_however_often_they_begin_anew(
    runs: list[int], window: int, padded: bool
) -> None:
    """Rows of chained frames lie between each other's, and runs that end leave holes of all sizes."""
    layout = StreamLayout(rows=5, columns=4, prefix=0, before=1, after=0)
    schedule = Schedule.chained(layout, 1)
    widths = np.arange(33, dtype=np.int32)
    padded_widths = (-(-widths // 8) * 8 if padded else widths).astype(np.int32)
    stream = Stream(layout, window, padded_widths, history=99)
    ring = SlotRing(slots_needed(layout, window, 32), in_sight=slots_in_sight(layout, window))
    stream.start(np.zeros((1, 5, 4), np.int32), np.zeros((1, 1), np.int32))
    engine, prepared = ring.slot_position.copy(), 1
    for count in runs:
        stream.follow(np.zeros((count, 1), np.int32))
        ring.rewind(stream.fed)
        prepared = stream.known
        for _ in range(count):
            for block in ScheduledDecoder(schedule).blocks(stream):
                while prepared < stream.begun:
                    ring.evict(0, layout.frame_start(max(0, prepared - window + 1)))
                    prepared += 1
                shape = block.shape
                updates = ring.append(block.positions.astype(np.int32), shape, padded_widths[shape.widths])
                seen = replayed(engine, updates)[-1]
                held = np.sort(seen[seen != VOID])
                assert len(set(held.tolist())) == len(held)
                oldest = layout.frame_start(max(0, stream.begun - window))
                assert set(range(oldest, stream.fed)) <= set(held.tolist())
