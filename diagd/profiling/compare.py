"""Two reports against each other: what changed beyond noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np

from diagd.errors import UsageError
from diagd.profiling.measure import bucket
from diagd.profiling.report import Report, Run

TOLERANCE: Final = 0.03
"""Changes up to this share are not called a regression, however sure they are."""

LEAST_SAMPLES: Final = 8
RESAMPLES: Final = 1000
CONFIDENCE: Final = 0.99


@dataclass(frozen=True)
class Change:
    """Steps of one width bucket of one order: medians, their ratio with its interval, and the verdict.

    ``verdict`` is ``slower``, ``faster``, ``same``, or ``too few`` where there are not enough samples.
    """

    order: str
    width: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All changes, and why the two reports may not be comparable."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> list[Change]:
        """Changes for the worse, beyond noise and tolerance."""
        return [change for change in self.changes if change.verdict == "slower"]


def compare(before: Report, after: Report) -> Comparison:
    """Compare the steps of every order that both reports measured.

    Raises:
        UsageError: they have no order in common.
    """
    later = {run.order: run for run in after.runs}
    pairs = [(run, later[run.order]) for run in before.runs if run.order in later]
    changes = [change for first, second in pairs for change in _changes(first, second)]
    if not changes:
        raise UsageError("the reports have no decoding order in common; profile both with the same --k")
    return Comparison(tuple(changes), tuple(_notes(before, after)))


def _changes(before: Run, after: Run) -> list[Change]:
    first, second = _by_width(before), _by_width(after)
    return [_change(before.order, width, first[width], second[width]) for width in first if width in second]


def _change(order: str, width: str, before: Sequence[float], after: Sequence[float]) -> Change:
    ratio = median_ratio(before, after)
    if min(len(before), len(after)) < LEAST_SAMPLES:
        verdict = "too few"
    elif ratio.low > 1 and ratio.value > 1 + TOLERANCE:
        verdict = "slower"
    elif ratio.high < 1 and ratio.value < 1 - TOLERANCE:
        verdict = "faster"
    else:
        verdict = "same"
    medians = median(before), median(after)
    return Change(order, width, *medians, ratio.value, ratio.low, ratio.high, verdict)


def _by_width(run: Run) -> dict[str, list[float]]:
    """Seconds of whole steps by width bucket; one of no seconds was not measured."""
    steps: dict[str, list[float]] = {}
    for sample in sorted(run.samples, key=lambda sample: sample.rows):
        if sample.seconds > 0:
            steps.setdefault(bucket(sample.rows), []).append(sample.seconds)
    return steps


def _notes(before: Report, after: Report) -> list[str]:
    pairs = {
        "model": (before.model.name, after.model.name),
        "precision": (before.model.precision, after.model.precision),
        "engine": (before.model.engine, after.model.engine),
        "window": (before.model.window, after.model.window),
        "processor": (before.machine.processor, after.machine.processor),
        "device": (before.machine.device or "none", after.machine.device or "none"),
        "threads": (before.machine.threads, after.machine.threads),
    }
    return [f"{name} differs: {a} and {b}" for name, (a, b) in pairs.items() if a != b]


@dataclass(frozen=True)
class Ratio:
    """Ratio of two medians and the interval that holds it with ``CONFIDENCE``."""

    value: float
    low: float
    high: float


def median_ratio(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Ratio:
    """Bootstrap interval of median(after) / median(before) (Efron, 1979), the same for the same seed."""
    random = np.random.default_rng(seed)
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    medians = [
        np.median(values[random.integers(0, len(values), (RESAMPLES, len(values)))], axis=1)
        for values in (first, second)
    ]
    edges = (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE))
    low, high = np.percentile(medians[1] / medians[0], edges)
    return Ratio(float(np.median(second) / np.median(first)), float(low), float(high))
