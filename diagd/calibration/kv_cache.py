"""K/V rows of 8 bits: which bundles can hold them, and the scales of their channels.

Every channel of every head has one scale, symmetric around zero, found along the same schedules as the ranges
of activations. A row is rounded before anything attends to it, its own step included: what a query sees does
not depend on how rows were batched into steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, Form, Manifest
from diagd.bundle.manifest import RotaryContext
from diagd.bundle.precision import FLOATING, KV_CACHES
from diagd.calibration.matrices import check_form
from diagd.calibration.observe import InputStatistics
from diagd.calibration.options import Scheme
from diagd.calibration.report import CacheReport
from diagd.calibration.search import decibels
from diagd.engines.buffers import cache_tensors
from diagd.errors import UsageError, unknown

Float = NDArray[np.float32]

CACHE_FORMS = (Form.PREFIX, Form.PORTABLE)
"""Forms that quantised rows can be judged by; the prefix form, which is quicker, only rounds them."""

LEVELS = 127

HEADROOM = 1.25
"""Reach of a scale over the largest magnitude seen: a key cut off costs more than 2 dB of rounding."""

SMALLEST_SCALE = 2.0**-14
"""Smallest normal number of float16."""


def check_kv_cache(bundle: Bundle, scheme: Scheme, kv_cache: str | None) -> None:
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
