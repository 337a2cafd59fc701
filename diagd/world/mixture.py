"""Mixtures of decoding schedules that a model is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diagd.calibration.teacher_forcing import TeacherForcedPass, teacher_forced_pass
from diagd.errors import unknown
from diagd.schedule import Schedule, StreamLayout

Share = tuple[float, Schedule]

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


@dataclass(frozen=True)
class ForcedBatch:
    """Inputs and targets of one parallel forward.

    Attributes:
        ids, positions: int64 [B, R].
        targets: int64 [B, R], ids, or -1 where nothing is scored.
        visible: bool [B, R, R].
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    visible: Tensor

    def to(self, device: str) -> ForcedBatch:
        """The same batch on a device."""
        return ForcedBatch(*(t.to(device) for t in (self.ids, self.positions, self.targets, self.visible)))


class ForcedPasses:
    """The teacher-forced passes of several schedules, padded to one length."""

    def __init__(self, schedules: Sequence[Schedule], frames: int, *, score_prompt: bool) -> None:
        passes = [teacher_forced_pass(s, frames, score_prompt=score_prompt) for s in schedules]
        rows = max(p.rows for p in passes)
        padded: list[TeacherForcedPass] = [p.padded(rows) for p in passes]
        self.sources = np.stack([p.sources for p in padded])
        self.positions = torch.from_numpy(np.stack([p.positions for p in padded]))
        self.targets = np.stack([p.targets for p in padded])
        self.visible = torch.from_numpy(np.stack([p.visible for p in padded]))

    def batch(
        self, streams: np.ndarray[tuple[int, int], np.dtype[np.int64]], choice: Sequence[int]
    ) -> ForcedBatch:
        """Feed window b of ``streams`` int64 [B, N] through pass ``choice[b]``."""
        picked = np.asarray(choice)
        sources, targets = self.sources[picked], self.targets[picked]
        ids = np.take_along_axis(streams, sources, axis=1)
        answers = np.where(targets < 0, -1, np.take_along_axis(streams, np.maximum(targets, 0), axis=1))
        return ForcedBatch(
            torch.from_numpy(ids), self.positions[picked], torch.from_numpy(answers), self.visible[picked]
        )
