"""Numbers that describe a set of times, and how sure a ratio of two sets is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

RESAMPLES: Final = 1000
CONFIDENCE: Final = 0.99


class Statistics(BaseModel):
    """Seconds of repeated work; ``jitter`` is the mean change from one to the next."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    count: int
    total: float
    mean: float
    p50: float
    p90: float
    p99: float
    max: float
    jitter: float


def describe(seconds: Sequence[float] | NDArray[np.float64]) -> Statistics:
    """Describe times, in the order in which they happened; none gives zeros."""
    values = np.asarray(seconds, np.float64)
    if not len(values):
        return Statistics(count=0, total=0, mean=0, p50=0, p90=0, p99=0, max=0, jitter=0)
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return Statistics(
        count=len(values),
        total=float(values.sum()),
        mean=float(values.mean()),
        p50=float(p50),
        p90=float(p90),
        p99=float(p99),
        max=float(values.max()),
        jitter=float(np.abs(np.diff(values)).mean()) if len(values) > 1 else 0.0,
    )


@dataclass(frozen=True)
class Ratio:
    """Ratio of two medians and the interval that holds it with ``CONFIDENCE``."""

    value: float
    low: float
    high: float


def median_ratio(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Ratio:
    """Bootstrap interval of median(after) / median(before) (Efron, 1979), the same for the same seed.

    Args:
        before: times, at least one.
        after: likewise.
        seed: of the resampling.
    """
    random = np.random.default_rng(seed)
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    medians = [
        np.median(values[random.integers(0, len(values), (RESAMPLES, len(values)))], axis=1)
        for values in (first, second)
    ]
    edges = (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE))
    low, high = np.percentile(medians[1] / medians[0], edges)
    return Ratio(float(np.median(second) / np.median(first)), float(low), float(high))


def slow_ones(seconds: Sequence[float], groups: Sequence[int], factor: float = 3.0) -> list[int]:
    """Indices of times that stand out from others of their group: above ``factor`` medians, slowest first.

    Times below 0.1 ms above the median are noise of the clock and the scheduler, and are not reported.
    """
    values, keys = np.asarray(seconds, np.float64), np.asarray(groups)
    expected = np.zeros_like(values)
    for key in np.unique(keys):
        expected[keys == key] = np.median(values[keys == key])
    slow = np.flatnonzero((values > factor * expected) & (values > expected + 1e-4))
    return [int(index) for index in slow[np.argsort(-values[slow])]]
