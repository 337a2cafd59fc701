"""How far a training is, the learning rate that goes with it, and the file that it goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diagd.bundle.files import atomic_file
from diagd.errors import UsageError

WARM_UP, WARM_UP_SHARE, FLAT_UNTIL = 60, 0.2, 0.3


@dataclass(frozen=True)
class Progress:
    """One line of a training log.

    Attributes:
        step, steps: done, and in all.
        loss: of the step; of the transformer in nats per token. None where nothing is learned.
        seconds: since this run began.
        first: steps that earlier runs did.
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
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(asdict(progress)) + "\n")
    if report is not None:
        report(progress)


def learning_rate(step: int, steps: int) -> float:
    """Share of the base rate at ``step`` in 1..steps: linear warm-up, flat, linear decay to 0."""
    warm_up = min(WARM_UP, WARM_UP_SHARE * steps)
    return min(1.0, step / warm_up, (1.0 - step / steps) / (1.0 - FLAT_UNTIL))


class Checkpoint:
    """A training in a file, from which it goes on where it was stopped: modules and optimisers by name.

    ``recipe``: all that decides the result, as JSON data. ``kind``: what is trained, for messages.
    """

    def __init__(self, path: Path, kind: str, recipe: dict[str, Any], parts: Mapping[str, Any]) -> None:
        self._path, self._kind, self._recipe, self._parts = path, kind, json.dumps(recipe), parts

    def resumed(self, device: str) -> int:
        """Be as when the file was written, if it is there; gives the steps that were done.

        Raises:
            UsageError: it is of another recipe.
        """
        if not self._path.exists():
            return 0
        state = torch.load(self._path, weights_only=True, map_location=device)
        recipe = json.loads(state["recipe"])
        recipe.pop("processes", None)  # was part of it; any number of them sees the same batches
        if recipe != json.loads(self._recipe):
            raise UsageError(
                f"{self._path} belongs to another {self._kind}: {state['recipe']}; give its options again to "
                "resume, or another output folder to start anew"
            )
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])

    def write(self, step: int) -> None:
        """Write the file."""
        state = {name: part.state_dict() for name, part in self._parts.items()}
        with atomic_file(self._path) as path, path.open("wb") as file:
            torch.save({"step": step, "recipe": self._recipe} | state, file)  # a path's name would be in it
