"""Trainings that torchrun starts, for `test_ranks`. Argument: the folder that they read and write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from diagd.progress import is_first
from diagd.schedule import Schedule
from diagd.tuning.align import Report, align, together
from diagd.tuning.options import AlignOptions, PreferTraining
from diagd.tuning.preference import Lesson, tune
from tests.oracles.models import CODES, small_model
from tests.tuning.test_align import CHAINED, LAYOUT, streams

SHARES = ((0.5, Schedule.next_token(LAYOUT)), (0.5, CHAINED))
"""They score different numbers of tokens."""

BATCH = 5
"""Which two cannot share evenly."""


def aligned(folder: Path, report: Report) -> dict[str, torch.Tensor]:
    """Weights of an alignment that is kept as it goes."""
    options = AlignOptions(
        SHARES, 6, BATCH, rate=1e-2, rank=2, autocast=False, resume=folder / "kept", keep_every=2
    )
    return align(small_model(LAYOUT), streams(8), options, report).state_dict()


def preferred(report: Report) -> None:
    """Windows are preferred to such as end otherwise."""
    good, bad = streams(8), streams(8)
    bad[:, -LAYOUT.cells - 1 : -1] = np.random.default_rng(1).integers(0, CODES, (8, LAYOUT.cells))
    lesson = Lesson(good, bad, np.linspace(0.5, 1.5, 8, dtype=np.float32), 10.0, 0.2)
    options = PreferTraining(SHARES, 4, BATCH, rate=1e-2, rank=2, autocast=False)
    with together("cpu") as ranks:
        tune(small_model(LAYOUT), lesson, 1, options, report, ranks=ranks)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    losses: dict[str, dict[int, float]] = {"aligned": {}, "preferred": {}}
    with together("cpu"):
        weights = aligned(place, losses["aligned"].__setitem__)
        preferred(losses["preferred"].__setitem__)
    if is_first():
        torch.save(weights, place / "weights")
        (place / "losses.json").write_text(json.dumps(losses))
