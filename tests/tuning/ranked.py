"""An alignment that torchrun starts, for `test_ranks`. Argument: the folder that it reads and writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from diagd.progress import is_first
from diagd.schedule import Schedule
from diagd.tuning.align import Report, align
from diagd.tuning.options import AlignOptions
from tests.oracles.models import small_model
from tests.tuning.test_align import CHAINED, LAYOUT, streams


def tuned(folder: Path, report: Report) -> dict[str, torch.Tensor]:
    """By two schedules that score different numbers of tokens, in batches that two cannot share evenly."""
    options = AlignOptions(
        ((0.5, Schedule.next_token(LAYOUT)), (0.5, CHAINED)),
        steps=6,
        batch=5,
        rate=1e-2,
        rank=2,
        autocast=False,
        resume=folder / "kept",
        keep_every=2,
    )
    return align(small_model(LAYOUT), streams(8), options, report).state_dict()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    losses: dict[int, float] = {}
    weights = tuned(place, losses.__setitem__)
    if is_first():
        torch.save(weights, place / "weights")
        (place / "losses.json").write_text(json.dumps(losses))
