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
        rounds = np.maximum((positions - self._pinned) // self._ring, 0)
        places: NDArray[np.int32] = (positions - rounds * self._ring).astype(np.int32)
        return places

    def cells(self, frame: int) -> slice:
        """Places of a frame's cells: neighbours, for the ring holds whole frames."""
        ahead = max(0, (frame - 1) // self.frames) * self._ring
        first = self._layout.first_cell(frame) - ahead
        return slice(first, first + self._layout.cells)
