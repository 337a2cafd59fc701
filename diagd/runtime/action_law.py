"""Which ids an action that the model decodes may have, place by place, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Manifest
from diagd.engines.engine import Float, Int, SamplingState
from diagd.engines.sampler import sample


@dataclass(frozen=True, eq=False)
class ActionLaw:
    """The slots of a model's actions as its sampler needs them.

    Engines draw cells only; the few rows of an action are drawn here, by the rules of the same sampler.

    Attributes:
        slots: ids of each token between the cells of two frames.
        keep_crossing: see ``SamplingRules``.
    """

    slots: tuple[tuple[int, ...], ...]
    keep_crossing: bool

    @classmethod
    def of(cls, manifest: Manifest) -> ActionLaw | None:
        """That of a model; None where it takes no actions, or its head has no ids for them."""
        codec = manifest.actions
        if codec is None or len(codec.slots) != manifest.layout.gap:
            return None
        slots = tuple(slot.ids for slot in codec.slots)
        if max(map(max, slots)) >= manifest.output_vocabulary:
            return None
        return cls(slots, manifest.sampling.keep_crossing)

    def draw(self, logits: Float, place: int, positions: NDArray[np.int64], state: SamplingState) -> Int:
        """Ids int32 [R] of neighbouring tokens of an action.

        Args:
            logits: float32 [R, V] of the rows ahead of them.
            place: of the first one in the action.
            positions: int [R], where they stand in the stream: those of their noise.
            state: of the sampler.
        """
        allowed = np.full_like(logits, -np.inf)
        for row, ids in enumerate(self.slots[place : place + len(logits)]):
            allowed[row, ids] = logits[row, ids]
        return sample(allowed, positions, state, keep_crossing=self.keep_crossing)

    def guess(self, before: Int) -> Int:
        """An action to begin with: the one before, where there was one, else the first ids."""
        if len(before) == len(self.slots):
            return before.copy()
        return np.array([ids[0] for ids in self.slots], np.int32)
