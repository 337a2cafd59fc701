"""The decoding orders that are planned, measured and checked, and which cells each of their steps decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Manifest
from diagd.profiling.report import Skipped
from diagd.runtime.session import Session
from diagd.schedule import NO_SINK, RowSeed, Schedule, StreamLayout, Table, check_lags


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

    The ``frames`` of the run include known ones.
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


@dataclass(frozen=True)
class Frontier:
    """Steps of every cell of a run: int32 [frames, rows, columns], counted from the first that decodes."""

    steps: NDArray[np.int32]
    widths: NDArray[np.int32]

    @property
    def last(self) -> int:
        """The step that decodes the last cell."""
        return int(self.steps.max())


def frontier(schedule: Schedule, frames: int) -> Frontier:
    """The steps of ``frames`` frames behind one known frame."""
    layout = schedule.layout
    table = schedule.table(1, frames, 0)
    step_of_row = np.repeat(np.arange(table.steps, dtype=np.int32), table.widths)
    decoded = table.sinks != NO_SINK
    offset = table.sinks[decoded] - layout.first_cell(1)
    frame, cell = np.divmod(offset, layout.frame_length)
    steps = np.full((frames, layout.cells), -1, np.int32)
    steps[frame, cell] = step_of_row[decoded]
    return Frontier(steps.reshape(frames, layout.rows, layout.columns), table.widths.astype(np.int32))


def as_text(steps: NDArray[np.int32]) -> str:
    """The step of each cell of a frame [rows, columns], a line for each row."""
    size = len(str(int(steps.max())))
    return "\n".join(" ".join(f"{step:{size}d}" for step in row) for row in steps)


def table_lines(table: Table, first: int, count: int) -> list[str]:
    """Steps of a table in words: width, cells decoded, seeds, and positions that are only fed."""
    lines = []
    for index in range(first, min(first + count, table.steps)):
        step = table.step(index)
        decoded = int((step.sinks != NO_SINK).sum())
        seeds = int((step.sources != step.positions).sum())
        rows = ", ".join(
            f"{source}" + (f"@{position}" if source != position else "") + (f">{sink}" if sink >= 0 else "")
            for source, position, sink in zip(step.sources, step.positions, step.sinks, strict=True)
        )
        shown = rows if len(rows) <= 200 else f"{rows[:197]}..."
        lines.append(f"step {index}: {step.width} rows, {decoded} cells, {seeds} seeds: {shown}")
    return lines
