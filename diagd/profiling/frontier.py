"""A schedule as text: which cells each step decodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diagd.schedule import NO_SINK, Schedule, Table


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
