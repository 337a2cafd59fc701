"""Where each token of the stream lies in the token buffer."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.schedule import StreamLayout

SCRATCH: Final = 256
"""Places that no step reads, one a row of the widest pass: for predictions that are not committed."""


class TokenPlaces:
    """Maps stream positions to places: the first frame stays, later frames share a ring.

    Row seeds reach back a few frames, and the ``prompt`` seed to the first one; nothing else is read again.
    """

    def __init__(self, layout: StreamLayout, frames: int) -> None:
        self.frames, self._layout = frames, layout
        self._pinned = layout.frame_start(1)
        self._ring = frames * layout.frame_length
        self.scratch = self._pinned + self._ring
        self.size = self.scratch + SCRATCH

    def of(self, positions: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """Places int32 [n] of stream positions."""
        ahead = positions - self._pinned
        round_trip: NDArray[np.int32] = (ahead % self._ring + self._pinned).astype(np.int32)
        if ahead.size and ahead.min() < 0:
            np.copyto(round_trip, positions, where=ahead < 0, casting="unsafe")
        return round_trip

    def of_neighbours(self, position: int, count: int) -> NDArray[np.int32]:
        """Places int32 [n] of so many positions from one on."""
        last = position + count - 1
        back = self._back(position)
        if back != self._back(last):
            return self.of(np.arange(position, last + 1))
        return np.arange(position - back, last + 1 - back, dtype=np.int32)

    def _back(self, position: int) -> int:
        """How far a place lies behind its position."""
        return max(0, (position - self._pinned) // self._ring) * self._ring

    def cells(self, frame: int) -> slice:
        """Places of a frame's cells: neighbours, for the ring holds whole frames."""
        ahead = max(0, (frame - 1) // self.frames) * self._ring
        first = self._layout.first_cell(frame) - ahead
        return slice(first, first + self._layout.cells)


def token_places(layout: StreamLayout, window: int) -> TokenPlaces:
    """Places for the window and the frames that seeds and chained frames reach beyond it.

    Beyond the frames that a query sees, chained frames are begun ahead of the one that is completed, and
    seeds reach back by one frame more than are in flight; a window holds the frames in flight, so four more
    suffice for every legal schedule: the one begun next, the seed's, and both ends of a frame that is cut by
    the ring.
    """
    return TokenPlaces(layout, window + 4)
