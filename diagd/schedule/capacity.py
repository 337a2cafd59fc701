"""What buffers and step graphs of a fixed size need."""

from __future__ import annotations

from typing import Final

from diagd.schedule.layout import StreamLayout
from diagd.schedule.schedule import Schedule

_ROWS: Final = 16
"""Reading the weights bounds a step of so many rows as it does one of 1; widths are multiples of it."""

_WIDEST: Final = 64
"""Enough for most models' widest step, and to feed a prompt in few passes."""


def slots_in_sight(layout: StreamLayout, window: int) -> int:
    """Slots from the oldest row of a window to the newest, those of seeds included, whatever the schedule."""
    return layout.prefix + window * (layout.frame_length + layout.rows + 1)


def slots_needed(layout: StreamLayout, window: int, max_width: int) -> int:
    """Capacity of KV buffers for a window: what is in sight, a frame of slack, and room to wrap."""
    return slots_in_sight(layout, window + 1) + max_width


def default_widths(layout: StreamLayout) -> tuple[int, int]:
    """Widths of step graphs that decode every schedule of a model, k = 1 with chained frames included."""
    widest = Schedule.chained(layout, 1).widest_step
    return _ROWS, max(_WIDEST, -(-widest // _ROWS) * _ROWS)
