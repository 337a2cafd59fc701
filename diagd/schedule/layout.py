"""Where the tokens of a video stand in the stream, and how many steps decode a frame.

Step counts are those of arXiv 2503.14070, section 3: s = w + (h-1)k, S = s + (T-1)d.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from diagd.errors import ScheduleError, expect


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


@dataclass(frozen=True)
class StreamLayout:
    """Raster order of a token stream: ``prefix`` tokens, then per frame ``before + cells + after`` tokens.

    ``prefix`` counts tokens ahead of the first frame (BOS); ``before`` and ``after`` count the known tokens
    (actions) around the cells of each frame. All positions are raster indices into the stream, from 0.
    ``prefix_tokens`` are the ids of the prefix where they are known; they give ``prefix`` if it is left out.
    """

    rows: int
    columns: int
    prefix: int = 0
    before: int = 0
    after: int = 0
    prefix_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        expect(StreamLayout, vars(self))
        if self.prefix_tokens and not self.prefix:
            object.__setattr__(self, "prefix", len(self.prefix_tokens))
        if self.rows < 1 or self.columns < 1:
            raise ScheduleError(f"a grid needs at least 1 x 1 cells, got {self.rows} x {self.columns}")
        if min(self.prefix, self.before, self.after) < 0:
            raise ScheduleError(f"token counts of a stream layout cannot be negative: {self}")
        if self.prefix_tokens and len(self.prefix_tokens) != self.prefix:
            raise ScheduleError(
                f"a stream layout has prefix={self.prefix} and {len(self.prefix_tokens)} prefix_tokens; give "
                "as many, or leave one of the two out"
            )

    def steps_per_frame(self, k: int) -> int:
        """Steps from the first to the last cell of one frame."""
        return self.columns + (self.rows - 1) * k

    def chained_lag(self, k: int) -> int:
        """Smallest frame lag: the next frame starts when the last row holds ``k`` cells."""
        return k * self.rows

    @property
    def cells(self) -> int:
        """Visual tokens of one frame."""
        return self.rows * self.columns

    @property
    def gap(self) -> int:
        """Known tokens between the cells of one frame and those of the next."""
        return self.before + self.after

    @property
    def frame_length(self) -> int:
        """Tokens of one frame, its known ones included."""
        return self.cells + self.gap

    def frame_start(self, frame: int) -> int:
        """Position of the first token that belongs to ``frame``."""
        return self.prefix + frame * self.frame_length

    def first_cell(self, frame: int) -> int:
        """Position of cell (frame, 0, 0)."""
        return self.frame_start(frame) + self.before

    def cell(self, frame: int, row: int, column: int) -> int:
        """Position of cell (frame, row, column), all from 0."""
        return self.first_cell(frame) + row * self.columns + column


def slots_in_sight(layout: StreamLayout, window: int) -> int:
    """Slots from the oldest row of a window to the newest, those of seeds included, whatever the schedule."""
    return layout.prefix + window * (layout.frame_length + layout.rows + 1)


def slots_needed(layout: StreamLayout, window: int, max_width: int) -> int:
    """Capacity of KV buffers for a window: what is in sight, a frame of slack, and room to wrap."""
    return slots_in_sight(layout, window + 1) + max_width


def fixed_slots(layout: StreamLayout, window: int, max_width: int, streams: int = 1) -> int:
    """Capacity of each stream's KV buffers where it is part of a graph; a multiple of 64."""
    # pad rows take slots too: where those in use lie in two parts, as many as a step writes are left
    slots = max(slots_needed(layout, window, max_width), slots_in_sight(layout, window) + 3 * max_width)
    # lanes that take no part in a pass write behind the slots of their streams
    return -(-(slots + max_width * (streams > 1)) // 64) * 64
