"""What an evaluation needs of a model, however it is run."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from diagd.export.families.world import World
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import Schedule, StreamLayout
from diagd.tuning.forced_batch import ForcedPasses, forced_nll
from diagd.tuning.recordings import FrameEncoder
from worlds.rollout import RolloutOptions, roll_out

Streams = NDArray[np.int64]
"""int64 [B, F * frame_length]: for each frame its action token, then its cells."""


class Subject(Protocol):
    """A model under evaluation."""

    layout: StreamLayout
    codes: int
    context_frames: int
    encoder: FrameEncoder

    def nll(self, streams: Streams, schedule: Schedule) -> NDArray[np.float32]:
        """Teacher-forced negative log-likelihood by position [B, N], nats; NaN in the first frame."""
        ...

    def roll_out(
        self, streams: Streams, prompt: int, schedule: Schedule, sampling: SamplingSettings, seed: int
    ) -> Streams:
        """The streams with every cell behind the ``prompt`` first frames decoded."""
        ...

    def pixels(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Frames uint8 [T, H, W, 3] of tokens [T, h, w]."""
        ...


class TorchSubject:
    """A world model run in PyTorch, many rollouts at once."""

    def __init__(self, world: World) -> None:
        self._model, self._codebook = world.model, world.codebook
        self.context_frames = world.description.context_frames
        self.encoder = FrameEncoder.of_codebook(world.codebook)
        self.layout, self.codes = world.description.layout, world.description.codes

    def nll(self, streams: Streams, schedule: Schedule) -> NDArray[np.float32]:
        """See `Subject.nll`."""
        frames = streams.shape[1] // self.layout.frame_length
        passes = ForcedPasses([schedule], frames, score_prompt=False)
        return forced_nll(self._model, passes, streams, 0)

    def roll_out(
        self, streams: Streams, prompt: int, schedule: Schedule, sampling: SamplingSettings, seed: int
    ) -> Streams:
        """See `Subject.roll_out`."""
        options = RolloutOptions(schedule, sampling, seed, self.context_frames)
        return roll_out(self._model, streams, prompt, options)

    def pixels(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        """See `Subject.pixels`."""
        frames, rows, columns = tokens.shape
        side = self._codebook.shape[1]
        grid = self._codebook[tokens].transpose(0, 1, 3, 2, 4, 5)
        return grid.reshape(frames, rows * side, columns * side, 3)
