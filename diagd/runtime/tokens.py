"""Where each token of the stream lies in the token buffer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diagd.schedule import NO_SINK, StreamLayout


class TokenPlaces:
    """Maps stream positions to places: the first frame stays, later frames share a ring.

    Row seeds reach back a few frames, and the ``prompt`` seed to the first one; nothing else is read again.
    """

    def __init__(self, layout: StreamLayout, frames: int) -> None:
        self._pinned = layout.frame_start(1)
        self._ring = frames * layout.frame_length
        self.size = self._pinned + self._ring + 1

    def of(self, positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Places int32 [n] of stream positions; ``NO_SINK`` goes to the last place, which nobody reads."""
        ring = self._pinned + (positions - self._pinned) % self._ring
        places = np.where(positions < self._pinned, positions, ring)
        return np.where(positions == NO_SINK, self.size - 1, places).astype(np.int32)
