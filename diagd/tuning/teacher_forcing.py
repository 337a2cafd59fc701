"""One parallel forward that gives every prediction of a schedule from a known video.

Each row of the schedule's table becomes one row of the sequence: the token that inference would feed, at its
position, seeing exactly what inference would see. Training on it aligns a model to the schedule
(arXiv 2503.14070, section 3.3); scoring on it measures the schedule without sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diagd.schedule import NO_SINK, Schedule, Table

NOT_SCORED = -1


@dataclass(frozen=True)
class TeacherForcedPass:
    """Inputs of the parallel forward; R rows in the order of the schedule.

    Attributes:
        sources: int64 [R], position in the video's stream of the token that is fed.
        positions: int64 [R], raster position at which it is fed.
        targets: int64 [R], position of the token to predict, or ``NOT_SCORED``.
        visible: bool [R, R], row r attends to column c.
    """

    sources: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    visible: NDArray[np.bool_]

    @property
    def rows(self) -> int:
        """Length of the sequence."""
        return len(self.sources)

    def padded(self, rows: int) -> TeacherForcedPass:
        """The same pass with unscored rows at the end, each seeing itself only."""
        extra = rows - self.rows
        visible = np.eye(rows, dtype=bool)
        visible[: self.rows, : self.rows] = self.visible
        return TeacherForcedPass(
            np.pad(self.sources, (0, extra)),
            np.pad(self.positions, (0, extra)),
            np.pad(self.targets, (0, extra), constant_values=NOT_SCORED),
            visible,
        )


def visible_rows(table: Table, *, keep_seeds: bool) -> NDArray[np.bool_]:
    """Which rows of a table see which: bool [R, R], row r attends to column c.

    A row sees what was fed by then at its own position or before it, guesses during their own step only.
    """
    positions = table.positions
    steps = np.repeat(np.arange(table.steps), table.widths)
    by_then, same_step = steps <= steps[:, None], steps == steps[:, None]
    is_lasting = (table.sources == positions) | keep_seeds
    visible: NDArray[np.bool_] = (positions <= positions[:, None]) & by_then & (is_lasting | same_step)
    return visible


def teacher_forced_pass(
    schedule: Schedule, frames: int, *, score_prompt: bool = False, prompt: int = 1
) -> TeacherForcedPass:
    """Derive the pass for a video of ``frames`` frames, the first of which are known.

    Args:
        schedule: decoding order, row seeds and refeeding.
        frames: frames of the video, more than ``prompt``.
        score_prompt: also predict the cells of the first frame, in raster order.
        prompt: frames that are known.

    Raises:
        ScheduleError: nothing is behind the prompt.
    """
    table = schedule.table(first_frame=prompt, frames=frames - prompt, fed=0)
    sources, positions, sinks = (a.astype(np.int64) for a in (table.sources, table.positions, table.sinks))
    visible = visible_rows(table, keep_seeds=schedule.keep_seeds)
    targets = np.where(sinks == NO_SINK, NOT_SCORED, sinks)
    if score_prompt:
        first, end = schedule.layout.first_cell(0), schedule.layout.first_cell(0) + schedule.layout.cells
        following = positions + 1
        in_prompt = (following >= first) & (following < end) & (sinks == NO_SINK)
        targets = np.where(in_prompt, following, targets)
    return TeacherForcedPass(sources, positions, targets, visible)
