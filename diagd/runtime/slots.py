"""Which raster position each slot of the KV buffers holds, and where each token lies in the token buffer."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import VOID, Int
from diagd.errors import DiagdError
from diagd.schedule import Shape, StreamLayout


class SlotOverflowError(DiagdError):
    """Live rows would be overwritten: the window does not fit the buffers."""

    exit_code = 1


class SlotUpdates(NamedTuple):
    """Where steps write, and which slots change ahead of each; int32, see ``diagd.engines.engine.Steps``."""

    write_index: Int
    live: Int
    offsets: Int
    slots: Int
    positions: Int


class SlotRing:
    """Appends steps in decode order over a ring of slots; evicted and voided slots are written again.

    Positions are rotary ones, counted from ``base`` in the stream. With ``zero_rows`` the ring starts behind
    that many slots which are never written: their K/V rows stay zero, and each is visible at its position
    until the real row is written, as in the released MineWorld code.

    Attributes:
        slot_position: int32 [capacity], as it is once every step appended so far has run.
        live: slots in use; none beyond is visible.
        write_index: slot that the next step begins at, if it fits behind it.
        stale: more changed than steps can carry; the engine must be given ``slot_position`` as a whole.
    """

    def __init__(
        self, capacity: int, zero_rows: tuple[int, int] = (0, 0), in_sight: int | None = None
    ) -> None:
        """``zero_rows`` is the range [first, last) of stream positions that have a zero slot.

        The ring turns at the first eviction once ``in_sight`` slots are behind it, and at its end without:
        attention reads every slot in use, so that a longer ring makes every step slower. What does not fit,
        as where overlapping frames come to an end, goes behind all that is in use. Frames that are decoded in
        raster order, by steps of whatever width, have their rows in the same slots: sums then run in the same
        order, to the bit.
        """
        self.slot_position: Int = np.full(capacity, VOID, np.int32)
        self._voids = self.slot_position.copy()
        self._zero_first, self._zero_last = zero_rows
        self._ring_start = zero_rows[1] - zero_rows[0]
        self._turn = capacity if in_sight is None else self._ring_start + in_sight
        self.restart(0)

    def restart(self, base: int) -> None:
        """Forget every row, and count positions from ``base`` on."""
        self.base, self.live = base, self._ring_start
        self.write_index, self._evicted = self._ring_start, False
        self.slot_position[:] = VOID
        self.slot_position[: self._ring_start] = np.arange(self._zero_first, self._zero_last)
        self.whole_sent()
        self.stale = True

    def whole_sent(self) -> None:
        """The engine has the positions of all slots."""
        self.stale = False
        self._hidden: Int = np.zeros(0, np.int32)

    def append(self, positions: Int, shape: Shape, padded: Int) -> SlotUpdates:
        """Take the next slots for a block of steps, those of a step all neighbours.

        Args:
            positions: [rows], rotary positions of the rows of all steps.
            shape: which rows are whose, and which of them are hidden once their step has run.
            padded: [steps], slots each step writes; those behind its rows take pad rows and stay void.

        Raises:
            SlotOverflowError: they hold visible rows.
        """
        starts, slots = self._take(shape, padded)
        self.slot_position[slots] = positions
        live = np.maximum.accumulate(np.maximum(starts + shape.widths, self.live))
        self.live, self.write_index = int(live[-1]), int(starts[-1] + shape.widths[-1])
        return SlotUpdates(starts, live, *self._updates(shape, slots, positions))

    def _take(self, shape: Shape, padded: Int) -> tuple[Int, Int]:
        """First slot of each step, and the slot of each row."""
        places = [self.write_index, self.live]
        if self._evicted and self.write_index >= self._turn:
            ring = self.slot_position[self._ring_start :]  # begins behind what never leaves, such as a prefix
            places.insert(0, self._ring_start + int(ring.argmax()))  # no position is larger than a void one's
        self._evicted = False
        ends = shape.offsets[:-1] + padded
        last = int(ends.max())
        for first in places:
            held = self.slot_position[first : first + last]
            if len(held) == last and held.min(initial=VOID) == VOID:
                starts = shape.offsets[:-1] + np.int32(first)
                return starts, np.arange(first, first + shape.offsets[-1], dtype=np.int32)
        return self._scatter(shape, padded)

    def _scatter(self, shape: Shape, padded: Int) -> tuple[Int, Int]:
        """Steps each in the next void run that holds it: where a flight began anew, runs are short."""
        bounds = np.flatnonzero(np.diff(self.slot_position == VOID, prepend=False, append=False)).tolist()
        runs = list(zip(bounds[::2], bounds[1::2], strict=True))
        behind = next((n for n, (_, last) in enumerate(runs) if last > self.write_index), 0)
        starts: list[int] = []
        own = runs[behind : behind + 1]  # from the write index on at first, up to it at last
        later = [(max(first, self.write_index), last) for first, last in own] + runs[behind + 1 :]
        earlier = runs[:behind] + [(first, min(last, self.write_index)) for first, last in own]
        for first, last in later + earlier:
            place = first
            while len(starts) < len(padded) and place + int(padded[len(starts)]) <= last:
                starts.append(place)
                place += int(shape.widths[len(starts) - 1])
        if len(starts) < len(padded):
            raise SlotOverflowError(
                f"{int(shape.offsets[-1])} slots from {self.write_index} of {len(self.slot_position)} are "
                "needed but hold visible rows; load the bundle with a larger window"
            )
        taken = np.asarray(starts, np.int32)
        slots = np.arange(shape.offsets[-1], dtype=np.int32)
        return taken, slots + np.repeat(taken - shape.offsets[:-1], shape.widths)

    def _updates(self, shape: Shape, slots: Int, positions: Int) -> tuple[Int, Int, Int]:
        """Slot changes ahead of each step: what was hidden before it, then its own rows.

        A row that is transient is hidden ahead of the next step; what the last step leaves to hide waits for
        the next block.
        """
        changed, values = slots[shape.changed], positions[shape.changed]
        values[shape.hides] = VOID
        self.slot_position[slots[shape.guesses]] = VOID
        waiting, self._hidden = self._hidden, slots[shape.last_guesses]
        offsets = shape.changes
        if waiting.size and shape.offsets[1]:  # a slot that is written at once need not be hidden
            waiting = waiting[(waiting - slots[0]).view(np.uint32) >= shape.offsets[1]]
        if waiting.size:
            changed = np.concatenate([waiting, changed])
            values = np.concatenate([self._voids[: len(waiting)], values])
            offsets = offsets + np.int32(len(waiting))
            offsets[0] = 0
        updates = offsets, changed, values
        return self._with_zero_rows(shape, positions, *updates) if self._ring_start else updates

    def _with_zero_rows(
        self, shape: Shape, positions: Int, offsets: Int, changed: Int, values: Int
    ) -> tuple[Int, Int, Int]:
        """The slot changes, and with them the zero slots whose real rows are written, which are hidden."""
        real = np.flatnonzero((positions >= self._zero_first) & (positions < self._zero_last))
        zeros = (positions[real] - self._zero_first).astype(np.int32)
        self.slot_position[zeros] = VOID
        step = np.searchsorted(shape.offsets, real, side="right") - 1
        at, void = offsets[step], np.full(len(zeros), VOID, np.int32)
        offsets = offsets + np.searchsorted(step, np.arange(len(offsets))).astype(np.int32)
        return offsets, np.insert(changed, at, zeros), np.insert(values, at, void)

    def evict(self, first: int, last: int) -> None:
        """Hide the rows up to stream position ``last``, those of a prefix of ``first`` tokens apart."""
        self._forget(first, last - self.base)
        self._evicted = True

    def _forget(self, first: int, last: int) -> None:
        held = self.slot_position[self._ring_start : self.live]
        gone = np.flatnonzero((held >= first) & (held < last)) + self._ring_start
        self.slot_position[gone] = VOID
        self._hidden = np.concatenate([self._hidden, gone.astype(np.int32)])
        if self.live and self.slot_position[self.live - 1] == VOID:
            left = np.flatnonzero(self.slot_position[: self.live] != VOID)
            self.live = max(self._ring_start, int(left[-1]) + 1) if left.size else self._ring_start

    def rewind(self, first: int) -> None:
        """Hide the rows at stream positions from ``first`` on, and write over those written last."""
        self._forget(first - self.base, VOID)
        if self._ring_start:
            zeros = np.arange(self._zero_first, self._zero_last, dtype=np.int32)
            again = zeros >= first - self.base
            self.slot_position[: self._ring_start][again] = zeros[again]
            self.stale = True
        start, ring = self._ring_start, len(self.slot_position) - self._ring_start
        held = np.flatnonzero(self.slot_position[start : self.live] != VOID)
        if not held.size:
            self.write_index = start
            return
        behind = (self.write_index - start - 1 - held) % ring
        self.write_index = start + int(held[behind.argmin()]) + 1

    def rebase(self, shift: int, prefix: int = 0) -> None:
        """Count positions from ``shift`` further on; those of the ``prefix``, seen by all, stay."""
        held = self.slot_position[: self.live]
        held[(held >= prefix) & (held != VOID)] -= np.int64(shift)
        self.base += shift
        self.stale = True


SCRATCH: Final = 256
"""Places that no step reads, one a row of the widest pass: for predictions that are not committed."""


class TokenPlaces:
    """Maps stream positions to places: the first frame stays, later frames share a ring.

    Row seeds reach back a few frames, and the ``prompt`` seed to the first one; nothing else is read again.
    """

    def __init__(self, layout: StreamLayout, window: int) -> None:
        """For a window and the frames that seeds and chained frames reach beyond it.

        Beyond the frames that a query sees, chained frames are begun ahead of the one that is completed, and
        seeds reach back by one frame more than are in flight; a window holds the frames in flight, so four
        more suffice for every legal schedule: the one begun next, the seed's, and both ends of a frame that
        is cut by the ring.
        """
        self.frames, self._layout = window + 4, layout
        self._pinned = layout.frame_start(1)
        self._ring = self.frames * layout.frame_length
        self.scratch = self._pinned + self._ring
        self.size = self.scratch + SCRATCH

    def of(self, positions: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """Places int32 [n] of stream positions."""
        back = np.maximum(positions - self._pinned, 0) // self._ring * self._ring
        places: NDArray[np.int32] = np.subtract(positions, back, dtype=np.int32, casting="unsafe")
        return places

    def cells(self, frame: int) -> slice:
        """Places of a frame's cells: neighbours, for the ring holds whole frames."""
        ahead = max(0, (frame - 1) // self.frames) * self._ring
        first = self._layout.first_cell(frame) - ahead
        return slice(first, first + self._layout.cells)
