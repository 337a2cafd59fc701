"""For each projection: how far its outliers move into the weight, where it clips, and what that costs.

Migration (SmoothQuant, arXiv 2211.10438): x @ W = (x / s) @ (s W) with s_j = max|x_j|^a / max|W_j|^(1 - a).
With weight-only schemes the same search protects the channels that matter (AWQ, arXiv 2306.00978).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diagd.calibration.encoding import ranges, rounded_rows, rounded_weight
from diagd.calibration.observe import InputStatistics
from diagd.calibration.options import Scheme
from diagd.calibration.stored import Array
from diagd.export.projections import Projection

Float = NDArray[np.float32]

ALPHAS = (None, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
COLUMNS = 512
"""Columns of a weight on which a search measures its error."""

SYNTHETIC_ROWS = 64


@dataclass(frozen=True)
class Choice:
    """What a search found for one projection.

    Attributes:
        alpha: of the migration; None without.
        factors: float32 [K], s: rows of the weight are multiplied by it; None without migration.
        limit: range of static activations; None where there is none.
        signal_to_noise: of the product on the sample rows, dB.
    """

    alpha: float | None
    factors: Float | None
    limit: float | None
    signal_to_noise: float


def search(
    projection: Projection,
    weight: Array,
    seen: InputStatistics | None,
    scheme: Scheme,
    grouped: bool,
) -> Choice:
    """Try every alpha and range, and keep those whose product is nearest.

    Args:
        projection: the product.
        weight: float [K, N].
        seen: its input while decoding; None where the scheme needs none.
        scheme: what to round to.
        grouped: 8-bit weights have groups.
    """
    columns = np.linspace(0, weight.shape[1] - 1, min(COLUMNS, weight.shape[1])).astype(int)
    part = np.asarray(weight[:, columns], np.float32)
    rows = _rows(seen, projection.inputs)
    exact = rows @ part
    tried = []
    for alpha in ALPHAS if projection.fold is not None and seen is not None else (None,):
        factors = None if alpha is None or seen is None else migration(seen.absmax, weight, alpha)
        moved, scaled = (rows, part) if factors is None else (rows / factors, part * factors[:, None])
        rounded = rounded_weight(scaled, scheme, grouped)
        for limit in ranges(moved.ravel()) if scheme.activation == "static" else [None]:
            product = rounded_rows(moved, limit, scheme) @ rounded
            tried.append(Choice(alpha, factors, limit, decibels(exact, product)))
    return max(tried, key=lambda choice: choice.signal_to_noise)


def migration(absmax: Float, weight: Array, alpha: float) -> Float:
    """Factors float32 [K], geometric mean 1; channels that are never used keep 1."""
    reach = np.concatenate(
        [np.abs(weight[start : start + 256]).max(axis=1) for start in range(0, len(weight), 256)]
    )
    used = (absmax > 0) & (reach > 0)
    logs = np.zeros(len(absmax))
    logs[used] = alpha * np.log(absmax[used]) - (1 - alpha) * np.log(reach[used].astype(np.float64))
    logs[used] -= logs[used].mean() if used.any() else 0
    return np.exp(logs).astype(np.float32)


def decibels(exact: Array, near: Array) -> float:
    """Signal to noise of ``near``."""
    noise = float(np.square(near - exact, dtype=np.float64).sum())
    signal = float(np.square(exact, dtype=np.float64).sum())
    return 10 * float(np.log10(max(signal, 1e-30) / max(noise, 1e-30)))


def _rows(seen: InputStatistics | None, channels: int) -> Float:
    """Sample rows; without them, normal ones of each channel's power."""
    if seen is not None and len(seen.sample):
        return seen.sample
    rows = np.random.default_rng(0).standard_normal((SYNTHETIC_ROWS, channels), dtype=np.float32)
    return rows if seen is None else rows * np.sqrt(seen.mean_square)
