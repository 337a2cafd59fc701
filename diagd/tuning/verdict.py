"""Whether a tuned model is better than the one it was, on contexts it never saw.

Figures are compared context by context, with the same random numbers for both models, and resampled over
contexts (the paired bootstrap): what is said of a difference is said of its 95 % interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from diagd.tuning.judge import Figures, Judge
from diagd.tuning.rollouts import Streams

NLL_RISE = 0.01
"""Largest relative rise of the likelihood of true windows, nats."""

_RESAMPLES = 2000

Measures = dict[str, NDArray[np.float64]]
"""By name, [C]: of each context; ``truth`` of each true window, nats a token."""


@dataclass(frozen=True)
class Change:
    """A figure before and after, and the 95 % interval of the difference.

    ``truth`` is told as the relative rise of the likelihood.
    """

    before: float
    after: float
    low: float
    high: float

    @classmethod
    def of(cls, before: NDArray[np.float64], after: NDArray[np.float64], *, relative: bool = False) -> Change:
        """From paired samples [C]."""
        picked = np.random.default_rng(0).integers(len(before), size=(_RESAMPLES, len(before)))
        differences = (after - before)[picked].mean(1)
        if relative:
            differences = differences / before[picked].mean(1)
        low, high = np.quantile(differences, (0.025, 0.975))
        return cls(float(before.mean()), float(after.mean()), float(low), float(high))


def measures(judge: Judge, rolled: Streams, reference: Figures, truth: NDArray[np.float64]) -> Measures:
    """What is compared of rollouts int64 [C, S, N], one for each context and seed.

    ``followed`` where actions can be read; ``score``; ``changed``: share of cells that change a frame;
    ``distinct``: share of cells in which rollouts of a context differ; ``unknown``: share of ids that true
    frames never have there.
    """
    contexts, seeds = rolled.shape[:2]
    figures = judge.figures(rolled.reshape(contexts * seeds, -1))
    means = {name: values.reshape(contexts, -1).mean(1) for name, values in figures.items()}
    pairs = [(rolled[:, a] != rolled[:, b]).mean(1) for a, b in combinations(range(seeds), 2)]
    found = {
        "score": judge.score(figures, reference).reshape(contexts, seeds).mean(1),
        "changed": means["changed"],
        "distinct": np.mean(pairs, axis=0),
        "unknown": 1 - means["known"],
        "truth": truth,
    }
    return found | ({"followed": means["followed"]} if "followed" in means else {})


@dataclass(frozen=True)
class Verdict:
    """Changes by name, and which of them are not allowed, in words."""

    changes: dict[str, Change]
    breaches: list[str]

    @classmethod
    def of(cls, before: Measures, after: Measures) -> Verdict:
        """Judge what a model became."""
        changes = {
            name: Change.of(values, after[name], relative=name == "truth") for name, values in before.items()
        }
        aim = aim_of(before)
        told = {
            f"{aim} is not up": changes[aim].low <= 0,
            f"NLL of true frames may be up by more than {NLL_RISE:.0%}": changes["truth"].high > NLL_RISE,
            "dynamics are lower": changes["changed"].high < 0,
            "rollouts are less distinct": changes["distinct"].high < 0,
            "unknown ids are up": changes["unknown"].low > 0,
        }
        return cls(changes, [words for words, is_so in told.items() if is_so])


def aim_of(found: Measures) -> str:
    """The figure that has to rise: actions followed, or the score where actions cannot be read."""
    return "followed" if "followed" in found else "score"
