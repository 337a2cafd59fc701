"""One parallel forward that gives every prediction of a schedule from a known video.

Each row of the schedule's table becomes one row of the sequence: the token that inference would feed, at its
position, seeing exactly what inference would see. Training on it aligns a model to the schedule
(arXiv 2503.14070, section 3.3); scoring on it measures the schedule without sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from diagd.schedule import NO_SINK, Schedule, StreamLayout, Table

NOT_SCORED = -1
_TOGETHER = 8  # windows that are scored at once


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


Logits = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A model: ids and positions [B, R] and an additive mask [B, R, R] to logits [B, R, V]."""


class ForcedBatch(NamedTuple):
    """Inputs and targets of one parallel forward.

    Attributes:
        ids, positions: int64 [B, R].
        targets: int64 [B, R], ids, or ``NOT_SCORED``.
        visible: bool [B, R, R].
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    visible: Tensor


class ForcedPasses:
    """The teacher-forced passes of several schedules over videos of equal length; R rows in their order.

    The first ``prompt`` of ``frames`` frames are known; with ``score_prompt`` the cells of the first one are
    predicted too, in raster order. Passes of fewer rows end in unscored ones, each seeing itself only.

    Attributes:
        names: of the schedules.
        sources: int64 [schedules, R], position in the video's stream of the token that is fed.
        positions: int64 [schedules, R], raster position at which it is fed.
        targets: int64 [schedules, R], position of the token to predict, or ``NOT_SCORED``.
        visible: bool [schedules, R, R], row r attends to column c.
        scored: int64 [schedules], tokens of a video that each one scores.

    Raises:
        ScheduleError: nothing is behind the prompt.
    """

    def __init__(
        self, schedules: Sequence[Schedule], frames: int, *, score_prompt: bool = False, prompt: int = 1
    ) -> None:
        tables = [schedule.table(first_frame=prompt, frames=frames - prompt, fed=0) for schedule in schedules]
        rows = max(len(table.sources) for table in tables)
        self.names = [schedule.name for schedule in schedules]
        self.sources = np.zeros((len(tables), rows), np.int64)
        positions, self.targets = np.zeros_like(self.sources), np.full_like(self.sources, NOT_SCORED)
        visible = np.tile(np.eye(rows, dtype=bool), (len(tables), 1, 1))
        for n, (schedule, table) in enumerate(zip(schedules, tables, strict=True)):
            part = slice(len(table.sources))
            self.sources[n, part], positions[n, part] = table.sources, table.positions
            self.targets[n, part] = _targets(table, schedule.layout, score_prompt=score_prompt)
            visible[n, part, part] = visible_rows(table, keep_seeds=schedule.keep_seeds)
        self.positions, self.visible = torch.from_numpy(positions), torch.from_numpy(visible)
        self.scored: NDArray[np.int64] = (self.targets != NOT_SCORED).sum(1)

    def batch(self, streams: NDArray[np.int64], choice: Sequence[int], device: str = "cpu") -> ForcedBatch:
        """Feed stream b of int64 [B, N] through the pass of schedule ``choice[b]``."""
        picked = np.asarray(choice)
        sources, targets = self.sources[picked], self.targets[picked]
        answers = np.take_along_axis(streams, np.maximum(targets, 0), axis=1)
        batch = (
            torch.from_numpy(np.take_along_axis(streams, sources, axis=1)),
            self.positions[picked],
            torch.from_numpy(np.where(targets == NOT_SCORED, NOT_SCORED, answers)),
            self.visible[picked],
        )
        return ForcedBatch(*(tensor.to(device) for tensor in batch))


def _targets(table: Table, layout: StreamLayout, *, score_prompt: bool) -> NDArray[np.int64]:
    targets = np.where(table.sinks == NO_SINK, NOT_SCORED, table.sinks).astype(np.int64)
    if score_prompt:
        first, following = layout.first_cell(0), table.positions + 1
        in_prompt = (following >= first) & (following < first + layout.cells) & (targets == NOT_SCORED)
        targets = np.where(in_prompt, following, targets)
    return targets


def forced_loss(model: Logits, batch: ForcedBatch, *, autocast: bool = True) -> Tensor:
    """Mean negative log-likelihood of the scored tokens, nats, a scalar; autocast computes in bfloat16."""
    logits = _logits(model, batch, autocast=autocast)
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=NOT_SCORED
    )


def window_nll(model: Logits, batch: ForcedBatch, *, autocast: bool = True) -> Tensor:
    """Mean negative log-likelihood [B] of the scored tokens of each window, nats."""
    logits = _logits(model, batch, autocast=autocast)
    loss = functional.cross_entropy(
        logits.transpose(1, 2).float(), batch.targets, ignore_index=NOT_SCORED, reduction="none"
    )
    return loss.sum(1) / (batch.targets != NOT_SCORED).sum(1)


@torch.inference_mode()
def forced_nll(
    model: Logits, passes: ForcedPasses, streams: NDArray[np.int64], choice: int, device: str = "cpu"
) -> NDArray[np.float32]:
    """Negative log-likelihood of every token of ``streams`` int64 [B, N] under schedule ``choice``.

    Returns:
        float32 [B, N], nats by stream position; NaN where nothing is scored.
    """
    result = np.full(streams.shape, np.nan, np.float32)
    targets = passes.targets[choice]
    scored = targets != NOT_SCORED
    for start in range(0, len(streams), _TOGETHER):
        windows = streams[start : start + _TOGETHER]
        part = passes.batch(windows, [choice] * len(windows), device)
        logits = _logits(model, part, autocast=False)[:, scored]
        loss = functional.cross_entropy(
            logits.transpose(1, 2).float(), part.targets[:, scored], reduction="none"
        )
        result[start : start + _TOGETHER, targets[scored]] = loss.cpu().numpy()
    return result


def _logits(model: Logits, batch: ForcedBatch, *, autocast: bool) -> Tensor:
    kind = torch.bfloat16 if autocast else torch.float32
    # The attention kernels of the CPU are 1.5 times faster with an additive mask of their own type.
    mask = torch.zeros(batch.visible.shape, dtype=kind, device=batch.ids.device)
    mask.masked_fill_(~batch.visible, float("-inf"))
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=autocast):
        return model(batch.ids, batch.positions, mask)
