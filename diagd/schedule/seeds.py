"""Row seeds: stand-ins for a raster predecessor that is not decoded yet when a row starts."""

from __future__ import annotations

from enum import Enum


class RowSeed(str, Enum):
    """Which decoded token is fed at the position of the missing predecessor (f, i-1, w-1) of cell (f, i, 0).

    ``PREVIOUS_FRAME``: the same cell of the latest frame in which it is decoded.
    ``ABOVE``: the first cell of the row above.
    ``DUPLICATE``: the newest cell of the row above.
    ``PROMPT``: the same cell of the first prompt frame, as the released MineWorld code does.
    """

    PREVIOUS_FRAME = "previous_frame"
    ABOVE = "above"
    DUPLICATE = "duplicate"
    PROMPT = "prompt"
