"""Rounding of weights and activations; the arithmetic that every graph of a scheme repeats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.precision import GROUP
from diagd.calibration.options import E4M3_MAX, Scheme

Float = NDArray[np.float32]
Array = NDArray[Any]

CHUNK_BYTES = 64 << 20
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of a group's largest weight that are tried as its range."""

PERCENTILES = (99.9, 99.99, 99.999, 100.0)
"""Of the magnitudes of activations, that are tried as their range."""

SMALLEST = np.float32(1e-12)


def fp8(values: Array) -> Array:
    """Round to E4M3, saturating."""
    import ml_dtypes

    return np.clip(values, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)


def column_limit(weight: str) -> float:
    """Largest number that a column's scale maps to."""
    return E4M3_MAX if weight == "fp8" else 127.0


def encode_columns(weight: Array, scale: Float, kind: str) -> Array:
    """Integers (or E4M3 numbers) of a block [n, N] with a scale for each column [N]."""
    scaled = weight / scale
    if kind == "fp8":
        return fp8(scaled)
    return np.clip(np.rint(scaled), -127, 127).astype(np.int8)


def encode_groups(weight: Array, bits: int) -> tuple[NDArray[np.int8], Float]:
    """Symmetric integers [g, GROUP, N] and scales [g, N] of rows [g * GROUP, N].

    The range of each 4-bit group is the share of its largest weight that costs the least squared error.
    """
    groups = weight.reshape(-1, GROUP, weight.shape[1])
    top = 2 ** (bits - 1) - 1
    largest = np.maximum(np.abs(groups).max(axis=1), SMALLEST)
    best = np.full(largest.shape, np.inf, np.float32)
    scales = largest / top
    for clip in CLIPS if bits == 4 else (1.0,):
        scale = (largest * np.float32(clip) / top).astype(np.float32)
        rounded = np.clip(np.rint(groups / scale[:, None]), -top - 1, top) * scale[:, None]
        error = np.square(rounded - groups).sum(axis=1)
        scales = np.where(error < best, scale, scales)
        best = np.minimum(error, best)
    integers = np.clip(np.rint(groups / scales[:, None]), -top - 1, top).astype(np.int8)
    return integers, scales.astype(np.float32)


def pad_groups(weight: Array) -> Array:
    """Rows filled up with zeros to whole groups."""
    return np.pad(weight, ((0, -len(weight) % GROUP), (0, 0)))


def rounded_weight(weight: Float, scheme: Scheme, grouped: bool) -> Float:
    """The weight [K, N] as a graph of the scheme sees it; ``grouped`` for 8 bits in groups."""
    if scheme.weight == "int4" or grouped:
        bits = 4 if scheme.weight == "int4" else 8
        integers, scales = encode_groups(pad_groups(weight), bits)
        return (integers * scales[:, None]).reshape(-1, weight.shape[1])[: len(weight)]
    scale = np.maximum(np.abs(weight).max(axis=0), SMALLEST) / np.float32(column_limit(scheme.weight))
    rounded: Float = encode_columns(weight, scale, scheme.weight).astype(np.float32) * scale
    return rounded


def rounded_rows(rows: Float, limit: float | None, scheme: Scheme) -> Float:
    """Activations [n, K] as a graph of the scheme sees them; ``limit`` is the static range."""
    if scheme.activation is None:
        return rows
    if scheme.activation == "row":
        scale: Any = np.maximum(np.abs(rows).max(axis=1, keepdims=True), SMALLEST) / np.float32(127)
    else:
        scale = np.float32((limit or 0.0) / column_limit(scheme.weight))
    rounded: Float
    if scheme.weight == "fp8":
        rounded = fp8(rows / scale).astype(np.float32) * scale
    else:
        rounded = (np.clip(np.rint(rows / scale), -128, 127) * scale).astype(np.float32)
    return rounded


def ranges(values: Float) -> list[float]:
    """Limits worth trying: magnitudes below which ``PERCENTILES`` per cent of the values [n] lie."""
    return [float(limit) for limit in np.percentile(np.abs(values), PERCENTILES)]


def row_chunks(shape: tuple[int, ...], multiple: int = 1) -> Iterator[slice]:
    """Slices of rows of a float32 matrix, about ``CHUNK_BYTES`` each, in multiples of rows."""
    step = max(1, CHUNK_BYTES // (4 * shape[1] * multiple)) * multiple
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))
