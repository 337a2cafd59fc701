"""The decoding orders that are measured and checked."""

from __future__ import annotations

from diagd.bundle import Manifest
from diagd.schedule import Schedule, check_lags


def decoding_orders(manifest: Manifest, ks: tuple[int, ...]) -> list[Schedule]:
    """Next-token prediction, then serial and chained frames for each row lag, each order once.

    Raises:
        ScheduleError: a lag cannot be decoded.
    """
    layout, seed = manifest.layout, manifest.schedule.row_seed
    for k in ks:
        check_lags(layout.rows, layout.columns, k, max(1, k) * layout.rows)
    orders = [Schedule.next_token(layout)]
    for k in ks:
        orders += [make(layout, k, seed) for make in (Schedule.serial, Schedule.chained)]
    return list({(order.k, order.d): order for order in orders}.values())


def obstacle(schedule: Schedule, manifest: Manifest, window: int, frames: int, max_width: int) -> str | None:
    """Why a run cannot be decoded in this order, or None.

    Args:
        schedule: the order.
        manifest: of the model.
        window: frames a token may see.
        frames: of the run, known ones included.
        max_width: rows of the widest step that the engine takes.
    """
    overlapping = schedule.frames_in_flight
    if manifest.context.kind == "absolute" and schedule.d < schedule.steps_per_frame and frames > window:
        return f"{frames} frames slide a window of {window}, which this model does between frames only"
    if window < overlapping:
        return f"it has {overlapping} frames under way at once, the window holds {window}"
    widest = schedule.widest_step
    if widest > max_width:
        return (
            f"its steps feed up to {widest} tokens, graphs of this bundle take {max_width}; "
            f"export with --set widths={widest}"
        )
    return None
