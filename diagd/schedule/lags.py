"""Lags of Diagonal Decoding: which are legal, how many steps they take, and what a row starts from.

Step counts are those of arXiv 2503.14070, section 3: s = w + (h-1)k, S = s + (T-1)d.
"""

from __future__ import annotations

from enum import Enum

from diagd.errors import ScheduleError


def steps_per_frame(rows: int, columns: int, k: int) -> int:
    """Steps from the first to the last cell of one frame."""
    return columns + (rows - 1) * k


def total_steps(frames: int, rows: int, columns: int, k: int, d: int) -> int:
    """Steps that decode ``frames`` frames; 0 for no frame."""
    return steps_per_frame(rows, columns, k) + (frames - 1) * d if frames else 0


def chained_lag(rows: int, k: int) -> int:
    """Smallest frame lag: the next frame starts when the last row holds ``k`` cells."""
    return k * rows


def check_lags(rows: int, columns: int, k: int, d: int) -> None:
    """Refuse lags that cannot be decoded or that leave steps empty.

    Raises:
        ScheduleError: ``k`` outside 1..columns, or ``d`` outside k*rows..steps_per_frame.
    """
    if not 1 <= k <= columns:
        raise ScheduleError(
            f"row lag k={k} is outside 1..{columns}: a row needs at least one cell of the row above, "
            f"and has them all at k={columns} (next-token prediction); choose k in 1..{columns}"
        )
    low, high = chained_lag(rows, k), steps_per_frame(rows, columns, k)
    if d < low:
        raise ScheduleError(
            f"frame lag d={d} is below k*rows = {low}: the next frame would overtake the last row of this "
            f"one; choose d in {low} (chained) .. {high} (serial)"
        )
    if d > high:
        raise ScheduleError(
            f"frame lag d={d} is above the {high} steps of a frame at k={k}: the surplus steps would decode "
            f"nothing; choose d in {low} (chained) .. {high} (serial)"
        )


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
