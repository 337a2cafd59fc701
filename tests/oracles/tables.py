"""What every table of a schedule has to be, whatever made it."""

from __future__ import annotations

import numpy as np

from diagd.errors import ScheduleError
from diagd.schedule import NO_SINK, Schedule, Table


def check_table(table: Table, schedule: Schedule) -> None:
    """Refuse a schedule that decodes a cell twice or never, or reads one before it is decoded.

    Raises:
        ScheduleError: it does.
    """
    wanted, step = (
        len(table.frame_starts) * schedule.layout.cells,
        np.repeat(np.arange(table.steps), table.widths),
    )
    is_sink = table.sinks != NO_SINK
    cells, first, counts = np.unique(table.sinks[is_sink], return_index=True, return_counts=True)
    if (counts > 1).any():
        raise ScheduleError(f"the schedule decodes position {cells[counts > 1][0]} again")
    if len(cells) != wanted:
        raise ScheduleError(f"the schedule decodes {len(cells)} of {wanted} cells")
    places = np.searchsorted(cells, table.sources).clip(max=wanted - 1)
    early = (cells[places] == table.sources) & (step[is_sink][first][places] >= step)
    if early.any():
        row = early.argmax()
        raise ScheduleError(f"step {step[row]} of the schedule reads position {table.sources[row]} too early")
