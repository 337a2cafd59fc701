"""Decoding schedules as data: layouts, closed forms, row seeds and step tables. NumPy only."""

from diagd.schedule.layout import RowSeed, StreamLayout, fixed_slots, slots_in_sight, slots_needed
from diagd.schedule.schedule import Schedule, default_widths
from diagd.schedule.table import NO_SINK, Block, Shape, Step, Table, feed, predicting, shifted

__all__ = [
    "NO_SINK",
    "Block",
    "RowSeed",
    "Schedule",
    "Shape",
    "Step",
    "StreamLayout",
    "Table",
    "default_widths",
    "feed",
    "fixed_slots",
    "predicting",
    "shifted",
    "slots_in_sight",
    "slots_needed",
]
