"""A world model whose passes workers do, a few streams at a time, whoever of them does which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from diagd.runtime.pool import Workers
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import Schedule
from diagd.tuning.rollouts import TOGETHER, Streams
from worlds.model import WorldModel, open_model


class RollOut(NamedTuple):
    """What rollouts follow, apart from the schedule; see ``WorldModel.roll_out``."""

    prompt: int
    sampling: SamplingSettings
    seed: int


class Passes(NamedTuple):
    """An item of work: streams under a schedule; ``by`` None asks for their likelihood."""

    streams: Streams
    order: str
    by: RollOut | None


class ModelWorker:
    """A worker: a model on one thread, so that sums have the same order wherever they are taken."""

    def __init__(self, path: Path, precision: str | None, backend: str) -> None:
        torch.set_num_threads(1)
        self._model = open_model(path, precision, backend, threads=1)

    def __call__(self, passes: Passes) -> NDArray[Any]:
        """float32 [B, N] of likelihoods, or int64 [B, N] of streams."""
        schedule = Schedule.parse(passes.order, self._model.layout)
        if passes.by is None:
            return self._model.nll(passes.streams, schedule)
        return self._model.roll_out(
            passes.streams, passes.by.prompt, schedule, passes.by.sampling, passes.by.seed
        )


class ParallelModel(WorldModel):
    """Streams go out `TOGETHER` at a time, however many workers there are."""

    def __init__(self, model: WorldModel, workers: Workers[Passes, NDArray[Any]]) -> None:
        self.layout, self.codes, self.context_frames = model.layout, model.codes, model.context_frames
        self.encoder, self._model, self._workers = model.encoder, model, workers

    @override
    def nll(self, streams: Streams, schedule: Schedule) -> NDArray[np.float32]:
        return self._do([Passes(part, schedule.name, None) for _, part in _parts(streams)])

    @override
    def roll_out(
        self, streams: Streams, prompt: int, schedule: Schedule, sampling: SamplingSettings, seed: int
    ) -> Streams:
        return self._do(
            [
                Passes(part, schedule.name, RollOut(prompt, sampling, seed + first))
                for first, part in _parts(streams)
            ]
        )

    @override
    def pixels(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._model.pixels(tokens)

    def _do(self, items: Sequence[Passes]) -> NDArray[Any]:
        return np.concatenate([result for _, result in sorted(self._workers.map(items), key=_number)])


def _number(found: tuple[int, object]) -> int:
    return found[0]


def _parts(streams: Streams) -> list[tuple[int, Streams]]:
    return [(first, streams[first : first + TOGETHER]) for first in range(0, len(streams), TOGETHER)]
