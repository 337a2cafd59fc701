"""For each projection: how far its outliers move into the weight, where it clips, and what that costs.

Migration (SmoothQuant, arXiv 2211.10438): x @ W = (x / s) @ (s W) with s_j = max|x_j|^a / max|W_j|^(1 - a).
With weight-only schemes the same search protects the channels that matter (AWQ, arXiv 2306.00978).

In K/V rows of 8 bits every channel of every head has one scale, symmetric around zero, found along the same
schedules as the ranges of activations. A row is rounded before anything attends to it, its own step included:
what a query sees does not depend on how rows were batched into steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diagd.bundle import Bundle, Form, Manifest
from diagd.bundle.manifest import RotaryContext
from diagd.bundle.precision import FLOATING, KV_CACHES, Precision
from diagd.calibration.matrices import Array, check_form, ranges, rounded_rows, rounded_weight
from diagd.calibration.observe import InputStatistics
from diagd.calibration.report import CacheReport
from diagd.engines.engine import Float
from diagd.engines.tensors import cache_tensors
from diagd.errors import UsageError, unknown
from diagd.export.variants import Projection

ALPHAS = (None, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
COLUMNS = 512
"""Columns of a weight on which a search measures its error."""

SYNTHETIC_ROWS = 64

CACHE_FORMS = (Form.PREFIX, Form.PORTABLE)
"""Forms that quantised rows can be judged by; the prefix form, which is quicker, only rounds them."""

LEVELS = 127

HEADROOM = 1.25
"""Reach of a scale over the largest magnitude seen: a key cut off costs more than 2 dB of rounding."""

SMALLEST_SCALE = 2.0**-14
"""Smallest normal number of float16."""


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
    scheme: Precision,
    grouped: bool,
) -> Choice:
    """Try every alpha and range, and keep those whose product is nearest.

    ``weight``: float [K, N]. ``seen``: its input while decoding; None where the scheme needs none.
    ``grouped``: 8-bit weights have groups.
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
        for limit in ranges(moved.ravel()) if scheme.scaling == "static" else [None]:
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


def check_kv_cache(bundle: Bundle, scheme: Precision, kv_cache: str | None) -> None:
    """Refuse a cache that no graph of the bundle can hold.

    Raises:
        UsageError: it is unknown, or the bundle has no portable graph that can have the scheme.
    """
    if kv_cache is None:
        return
    if kv_cache not in KV_CACHES:
        raise unknown("K/V cache", kv_cache, KV_CACHES)
    if not any(g.form.traits.float_cache is None and g.precision in FLOATING for g in bundle.manifest.graphs):
        raise UsageError(
            f"{bundle.path} has no portable graph, the only form whose cache can be {kv_cache}: the modern "
            "form's TensorScatter takes floating point only, and the prefix form attends to its buffers as "
            "they lie; export it again with --form prefix,portable"
        )
    if not check_form(Form.PORTABLE, scheme):
        raise UsageError(
            f"{scheme.name} is for the prefix form, a cache of {kv_cache} for the portable form: "
            "choose another --precision, such as int8"
        )


def row_scales(seen: Mapping[str, InputStatistics], manifest: Manifest) -> dict[str, Float]:
    """Scales of each K/V tensor, float32 [G, D]: a row is stored as ``row / scale``.

    The two channels that a rotary embedding turns into each other share a scale that holds both at any
    angle: positions further on than the run has seen stay in range, and cached keys are turned as integers.
    """
    cache, scales = manifest.cache, {}
    for name in cache_tensors(cache.layers):
        reach = seen[name].absmax.reshape(cache.kv_heads, cache.head_size)
        if name.startswith("key") and isinstance(manifest.context, RotaryContext):
            reach = np.tile(np.hypot(*np.split(reach, 2, axis=1)), 2)
        scales[name] = np.maximum(reach * (HEADROOM / LEVELS), SMALLEST_SCALE).astype(np.float32)
    return scales


def describe_cache(
    scales: Mapping[str, Float], seen: Mapping[str, InputStatistics], manifest: Manifest, kv_cache: str
) -> CacheReport:
    """Bytes of a token before and after, and signal to noise of its rows."""
    elements = sum(scale.size for scale in scales.values())
    rounded = {
        name: np.clip(np.rint(seen[name].sample / scale.ravel()), -LEVELS - 1, LEVELS) * scale.ravel()
        for name, scale in scales.items()
    }
    return CacheReport(
        dtype=kv_cache,
        bytes_before=elements * np.dtype(manifest.cache.dtype).itemsize,
        bytes_after=elements * np.dtype(kv_cache).itemsize,
        signal_to_noise={name: decibels(seen[name].sample, rows) for name, rows in rounded.items()},
    )
