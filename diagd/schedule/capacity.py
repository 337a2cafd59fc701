"""Slots that a window of frames needs."""

from __future__ import annotations

from diagd.schedule.layout import StreamLayout


def slots_needed(layout: StreamLayout, window: int, max_width: int) -> int:
    """Capacity of KV buffers for a window: its rows and their seeds, a frame of slack, and room to wrap."""
    rows = layout.frame_length + layout.rows + 1
    return layout.prefix + (window + 1) * rows + max_width
