"""Decoding schedules as data: layouts, closed forms, row seeds and step tables. NumPy only."""

from diagd.schedule.layout import (
    RowSeed,
    StreamLayout,
    chained_lag,
    check_lags,
    slots_in_sight,
    slots_needed,
    steps_per_frame,
    total_steps,
)
from diagd.schedule.schedule import Schedule, default_widths
from diagd.schedule.table import NO_SINK, Block, Shape, Step, Table, feed, shifted

__all__ = [
    "NO_SINK",
    "Block",
    "RowSeed",
    "Schedule",
    "Shape",
    "Step",
    "StreamLayout",
    "Table",
    "chained_lag",
    "check_lags",
    "default_widths",
    "feed",
    "shifted",
    "slots_in_sight",
    "slots_needed",
    "steps_per_frame",
    "total_steps",
]
