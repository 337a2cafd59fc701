"""Where to clip an activation before it is rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from diagd.errors import unknown

Float = NDArray[np.float32]

PERCENTILES = (99.9, 99.99, 99.999, 100.0)
BINS = 2048
LEVELS = 128
"""Levels of one sign of a symmetric 8-bit integer."""


def percentile_ranges(values: Float) -> list[float]:
    """Magnitudes below which ``PERCENTILES`` per cent of the values [n] lie."""
    return [float(limit) for limit in np.percentile(np.abs(values), PERCENTILES)]


def mse_range(values: Float) -> list[float]:
    """Magnitude at which rounding and clipping together cost the least squared error."""
    largest = float(np.abs(values).max())
    candidates = largest * np.linspace(0.3, 1.0, 29)
    errors = [_rounding_error(values, limit) for limit in candidates]
    return [float(candidates[int(np.argmin(errors))])]


def entropy_range(values: Float) -> list[float]:
    """Magnitude at which the rounded distribution diverges least from the true one.

    The histogram search of TensorRT's calibrator (Migacz, "8-bit Inference with TensorRT", GTC 2017).
    """
    magnitudes = np.abs(values)
    largest = float(magnitudes.max())
    counts = np.histogram(magnitudes, BINS, (0, largest))[0].astype(np.float64)
    ends = np.arange(LEVELS, BINS + 1, 16)
    divergences = [_divergence(counts, int(end)) for end in ends]
    return [largest * int(ends[int(np.argmin(divergences))]) / BINS]


RangeRule = Callable[[Float], list[float]]
"""From values to the limits worth trying; the one whose product is nearest is taken."""

RANGES: dict[str, RangeRule] = {
    "percentile": percentile_ranges,
    "mse": mse_range,
    "entropy": entropy_range,
}


def find_range(method: str) -> RangeRule:
    """The rule of a name.

    Raises:
        UsageError: there is none.
    """
    if method not in RANGES:
        raise unknown("range", method, RANGES)
    return RANGES[method]


def _rounding_error(values: Float, limit: float) -> float:
    step = limit / 127
    rounded = np.clip(np.rint(values / step), -128, 127) * step
    return float(np.square(rounded - values).mean())


def _divergence(counts: NDArray[np.float64], end: int) -> float:
    kept = counts[:end].copy()
    kept[-1] += counts[end:].sum()
    groups = np.arange(end) * LEVELS // end
    sums = np.bincount(groups, counts[:end], LEVELS)
    filled = np.bincount(groups, kept > 0, LEVELS)
    rounded = np.where(kept > 0, (sums / np.maximum(filled, 1))[groups], 0)
    p, q = kept / kept.sum(), rounded / max(rounded.sum(), 1e-30)
    present = p > 0
    return float((p[present] * np.log(p[present] / np.maximum(q[present], 1e-12))).sum())
