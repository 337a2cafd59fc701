"""The ring of slots against a plain list of rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagd.engines.engine import VOID
from diagd.runtime.slots import SlotOverflowError, SlotRing


@given(st.lists(st.integers(1, 6), min_size=1, max_size=60), st.integers(12, 40))
def test_live_rows_are_never_overwritten(widths: list[int], keep: int) -> None:
    """Rows stay visible until they are evicted, wherever the ring wraps."""
    ring = SlotRing(np.zeros(keep + 14, np.int32))
    position, live = 0, []
    for width in widths:
        oldest = max(0, position + width - keep)
        ring.evict(0, oldest)
        start = ring.append(np.arange(position, position + width, dtype=np.int32), width)
        live = [p for p in live if p >= oldest] + list(range(position, position + width))
        assert start + width <= len(ring.slot_position)
        held = ring.slot_position[ring.slot_position != VOID]
        assert sorted(held.tolist()) == live
        assert (ring.slot_position[ring.live :] == VOID).all()
        position += width


def test_full_rings_refuse_instead_of_overwriting() -> None:
    ring = SlotRing(np.zeros(8, np.int32))
    ring.append(np.arange(6, dtype=np.int32), 6)
    with pytest.raises(SlotOverflowError, match="larger window"):
        ring.append(np.arange(6, 10, dtype=np.int32), 4)


def test_pad_rows_are_void_and_written_again() -> None:
    ring = SlotRing(np.zeros(8, np.int32))
    assert ring.append(np.array([0, 1], np.int32), 4) == 0
    assert ring.append(np.array([2], np.int32), 4) == 2
    assert ring.slot_position.tolist() == [0, 1, 2] + [VOID] * 5


def test_seeds_are_hidden_after_their_step() -> None:
    ring = SlotRing(np.zeros(8, np.int32))
    start = ring.append(np.array([0, 1, 2], np.int32), 3)
    ring.void(start, np.array([1]))
    assert ring.slot_position[:3].tolist() == [0, VOID, 2]


def test_zero_rows_are_visible_until_the_real_row_is_written() -> None:
    ring = SlotRing(np.zeros(12, np.int32), zero_rows=(0, 4))
    assert ring.append(np.array([1, 3], np.int32), 2) == 4
    assert ring.slot_position[:6].tolist() == [0, VOID, 2, VOID, 1, 3]
    ring.evict(0, 12)
    assert ring.slot_position[:6].tolist() == [0, VOID, 2, VOID, VOID, VOID]


def test_positions_are_counted_from_the_base() -> None:
    ring = SlotRing(np.zeros(6, np.int32))
    ring.append(np.array([4, 5], np.int32), 2)
    ring.rebase(4)
    assert ring.slot_position[:2].tolist() == [0, 1]
    ring.evict(0, 5)
    assert ring.slot_position[:2].tolist() == [VOID, 1]
