"""Which raster position each slot of the KV buffers holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import VOID, Int
from diagd.errors import DiagdError


class SlotOverflowError(DiagdError):
    """Live rows would be overwritten: the window does not fit the buffers."""

    exit_code = 1


class SlotRing:
    """Appends steps in decode order over a ring of slots; evicted and voided slots are written again.

    Positions are rotary ones, counted from ``base`` in the stream. With ``zero_rows`` the ring starts behind
    that many slots which are never written: their K/V rows stay zero, and each is visible at its position
    until the real row is written, as in the released MineWorld code.
    """

    def __init__(self, slot_position: Int, zero_rows: tuple[int, int] = (0, 0)) -> None:
        """``zero_rows`` is the range [first, last) of stream positions that have a zero slot."""
        self.slot_position = slot_position
        self.base = 0
        self._zero_first, self._zero_last = zero_rows
        self.reset()

    def reset(self) -> None:
        """Forget every row."""
        self.base, self.live = 0, self._ring_start
        self.write_index = self._ring_start
        self.slot_position[:] = VOID
        self.slot_position[: self._ring_start] = np.arange(self._zero_first, self._zero_last)

    def restart(self, base: int) -> None:
        """Forget every row, and count positions from ``base`` on."""
        self.reset()
        self.base = base

    @property
    def _ring_start(self) -> int:
        return self._zero_last - self._zero_first

    def append(self, positions: Int, width: int) -> int:
        """Take the next slots, all neighbours, and return the first.

        Args:
            positions: rotary positions of the step's rows.
            width: slots the step writes; those behind its rows take pad rows and stay void.

        Raises:
            SlotOverflowError: they hold visible rows.
        """
        start = self.write_index
        if start + width > len(self.slot_position):
            start = self._ring_start
        taken = self.slot_position[start : start + width]
        if len(taken) < width or (taken != VOID).any():
            raise SlotOverflowError(
                f"{width} slots from {start} of {len(self.slot_position)} are needed but hold visible rows; "
                "load the bundle with a larger window"
            )
        if self._ring_start:
            self._void_zero_rows(positions)
        taken[: len(positions)] = positions
        self.write_index = start + len(positions)
        self.live = max(self.live, self.write_index)
        return start

    def void(self, start: int, rows: NDArray[np.intp]) -> None:
        """Hide rows of the step written at ``start`` from every later query."""
        self.slot_position[start + rows] = VOID

    def evict(self, first: int, last: int) -> None:
        """Hide the rows at stream positions [first, last)."""
        held = self.slot_position[self._ring_start : self.live]
        held[(held >= first - self.base) & (held < last - self.base)] = VOID

    def rebase(self, shift: int) -> None:
        """Count positions from ``shift`` further on; prefix tokens then stand at negative ones."""
        held = self.slot_position[: self.live]
        held[held != VOID] -= shift
        self.base += shift

    def _void_zero_rows(self, positions: Int) -> None:
        zero = positions[(positions >= self._zero_first) & (positions < self._zero_last)] - self._zero_first
        self.slot_position[zero] = VOID
