"""The decoding orders that are planned, measured and checked."""

from __future__ import annotations

from collections.abc import Sequence

from diagd.bundle import Manifest
from diagd.profiling.report import Skipped
from diagd.runtime.session import Session
from diagd.schedule import RowSeed, Schedule, StreamLayout, check_lags


def decoding_orders(manifest: Manifest, ks: tuple[int, ...]) -> list[Schedule]:
    """Next-token prediction, then serial and chained frames for each row lag, each order once.

    Raises:
        ScheduleError: a lag cannot be decoded.
    """
    return orders_of(manifest.layout, ks, manifest.schedule.row_seed)


def orders_of(
    layout: StreamLayout, ks: tuple[int, ...], seed: RowSeed = RowSeed.PREVIOUS_FRAME
) -> list[Schedule]:
    """The orders of a layout; see ``decoding_orders``."""
    for k in ks:
        check_lags(layout.rows, layout.columns, k, max(1, k) * layout.rows)
    orders = [Schedule.next_token(layout)]
    for k in ks:
        orders += [make(layout, k, seed) for make in (Schedule.serial, Schedule.chained)]
    return list({(order.k, order.d): order for order in orders}.values())


def split_orders(
    orders: Sequence[Schedule], session: Session, frames: int
) -> tuple[list[Schedule], list[Skipped]]:
    """Orders in which a session can decode a run of so many frames, and the others with the reason."""
    possible, skipped = [], []
    for order in orders:
        reason = obstacle(order, session.manifest, session.window, frames, session.engine.max_width)
        if reason is None:
            possible.append(order)
        else:
            skipped.append(Skipped(order=order.name, reason=reason))
    return possible, skipped


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
