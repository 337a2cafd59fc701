"""The decoding orders that are measured and checked."""

from __future__ import annotations

from diagd.bundle import Manifest
from diagd.schedule import Schedule, check_lags


def decoding_orders(manifest: Manifest, ks: tuple[int, ...]) -> list[Schedule]:
    """Next-token prediction, then serial and chained frames for each row lag, each order once.

    Raises:
        ScheduleError: a lag cannot be decoded.
    """
    layout, seed = manifest.layout.stream(), manifest.schedule.row_seed
    for k in ks:
        check_lags(layout.rows, layout.columns, k, max(1, k) * layout.rows)
    orders = [Schedule.next_token(layout)]
    for k in ks:
        orders += [make(layout, k, seed) for make in (Schedule.serial, Schedule.chained)]
    return list({(order.k, order.d): order for order in orders}.values())


def obstacle(schedule: Schedule, manifest: Manifest, window: int, frames: int) -> str | None:
    """Why a run of ``frames`` frames, known ones included, cannot be decoded in this order, or None."""
    overlaps = schedule.d < schedule.steps_per_frame
    if manifest.context.kind == "absolute" and overlaps and frames > window:
        return f"{frames} frames slide a window of {window}, which this model does between frames only"
    return None


def order_name(schedule: Schedule) -> str:
    """What people call an order."""
    if schedule.k == schedule.layout.columns:
        return "next token"
    kinds = {schedule.steps_per_frame: "serial", schedule.k * schedule.layout.rows: "chained"}
    return f"k={schedule.k} {kinds.get(schedule.d, f'd={schedule.d}')}"
