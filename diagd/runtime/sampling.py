"""How the tokens of a run are drawn, those of actions that the model decodes among them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, TypedDict

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Manifest
from diagd.bundle.manifest import SamplingRules
from diagd.engines.engine import Float, Int, SamplingState
from diagd.engines.sampler import sample
from diagd.errors import UsageError, expect

SAMPLER: Final = "race"
"""Name of the sampler in what is recorded of a run: seeds mean other tokens to another one."""

_TEMPERATURES: Final = (1e-3, 1e3)


class _Numbers(TypedDict):
    temperature: float
    top_k: float
    top_p: float


@dataclass(frozen=True)
class SamplingSettings:
    """How a token is drawn.

    Attributes:
        temperature: divisor of the logits; 0 is greedy and ignores top_k and top_p.
        top_k: most ids kept, ties aside; 0 keeps all.
        top_p: probability mass kept; 1 keeps all.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def of(cls, rules: SamplingRules, chosen: SamplingSettings | None = None) -> SamplingSettings:
        """Those of a bundle, or what was chosen, as its model allows it."""
        expect(cls.of, locals())
        settings = chosen or cls(rules.temperature, rules.top_k, rules.top_p)
        if 0 < settings.temperature < rules.minimum_temperature:
            return replace(settings, temperature=rules.minimum_temperature)
        return settings

    def __post_init__(self) -> None:
        expect(_Numbers, vars(self))
        low, high = _TEMPERATURES
        if self.temperature != 0 and not low <= self.temperature <= high:
            raise UsageError(
                f"temperature is {self.temperature}; expected 0 (greedy) or a number from {low:g} to {high:g}"
            )
        if not 0 <= self.top_k < math.inf or self.top_k != int(self.top_k):
            raise UsageError(f"top-k is {self.top_k}; expected a whole number of ids, or 0 to keep all")
        if not 0 < self.top_p <= 1:
            raise UsageError(
                f"top-p is {self.top_p}; expected a share of probability, above 0 and at most 1 (1 keeps all)"
            )


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
        """Ids int32 [R] of neighbouring tokens of an action, by logits float32 [R, V] of the rows ahead.

        ``place``: of the first one in the action. ``positions``: int [R] in the stream, those of their noise.
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
