"""How far a training is, and the learning rate that goes with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

WARM_UP, WARM_UP_SHARE, FLAT_UNTIL = 60, 0.2, 0.3


@dataclass(frozen=True)
class Progress:
    """One line of a training log.

    Attributes:
        step, steps: done, and in all.
        loss: of the step; of the transformer in nats per token. None where nothing is learned.
        seconds: since this run began.
        first: steps that earlier runs did.
        part: what is done.
    """

    step: int
    steps: int
    loss: float | None
    seconds: float
    first: int = 0
    part: str = "transformer"


Report = Callable[[Progress], None]


def log(path: Path, progress: Progress, report: Report | None) -> None:
    """Add a line to the log at ``path`` and report it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(progress)) + "\n")
    if report is not None:
        report(progress)


def learning_rate(step: int, steps: int) -> float:
    """Share of the base rate at ``step`` in 1..steps: linear warm-up, flat, linear decay to 0."""
    warm_up = min(WARM_UP, WARM_UP_SHARE * steps)
    return min(1.0, step / warm_up, (1.0 - step / steps) / (1.0 - FLAT_UNTIL))
