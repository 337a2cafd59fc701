"""Mixtures of decoding schedules that a model is trained on."""

from __future__ import annotations

from diagd.errors import unknown
from diagd.schedule import Schedule, StreamLayout

Share = tuple[float, Schedule]
"""Share of the training windows, and the schedule they are decoded by."""

MIXTURES = ("ntp", "diagonal", "mixture")
"""Next-token prediction alone; the chained k = 1 diagonal alone; both with k = 2 and serial frames."""


def mixture_shares(name: str, layout: StreamLayout) -> list[Share]:
    """Schedules of a mixture with the share of windows that each one gets.

    Raises:
        UsageError: a name outside `MIXTURES`.
    """
    raster, chained = Schedule.next_token(layout), Schedule.chained(layout, 1)
    if name == "ntp":
        return [(1.0, raster)]
    if name == "diagonal":
        return [(1.0, chained)]
    if name == "mixture":
        serial = Schedule.serial(layout, 1)
        return [(0.4, raster), (0.25, serial), (0.25, chained), (0.1, Schedule.serial(layout, 2))]
    raise unknown("mixture", name, MIXTURES)
