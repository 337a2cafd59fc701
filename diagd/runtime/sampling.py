"""How the tokens of a run are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from diagd.errors import UsageError

SAMPLER: Final = "race"
"""Name of the sampler in what is recorded of a run: seeds mean other tokens to another one."""

_TEMPERATURES: Final = (1e-3, 1e3)


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

    def __post_init__(self) -> None:
        low, high = _TEMPERATURES
        if self.temperature != 0 and not low <= self.temperature <= high:
            raise UsageError(
                f"temperature is {self.temperature}; expected 0 (greedy) or a number from {low:g} to {high:g}"
            )
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise UsageError(f"top-k is {self.top_k}; expected a whole number of ids, or 0 to keep all")
        if not 0 < self.top_p <= 1:
            raise UsageError(
                f"top-p is {self.top_p}; expected a share of probability, above 0 and at most 1 (1 keeps all)"
            )
