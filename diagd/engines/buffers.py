"""K/V buffers: allocated once, aligned, zero-filled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Manifest

ALIGNMENT = 64


def aligned_zeros(
    shape: Sequence[int], dtype: np.dtype[np.generic] | type[np.generic]
) -> NDArray[np.generic]:
    """A zero-filled array whose data starts on a cache line; untouched pages take no memory."""
    size: int = np.empty(0, dtype).itemsize * math.prod(shape)
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def cache_tensors(layers: int) -> list[str]:
    """Names of the K/V buffers in graph order: key_0, value_0, key_1, ..."""
    return [f"{kind}_{layer}" for layer in range(layers) for kind in ("key", "value")]


def text_buffers(manifest: Manifest) -> dict[str, NDArray[np.generic]]:
    """Buffers of a text's keys and values by input of the step graph; none for models without text."""
    if manifest.text is None:
        return {}
    cache = manifest.cache
    shape = (cache.kv_heads, manifest.text.length, cache.head_size)
    dtype = np.dtype(cache.dtype)
    return {f"text_{name}": aligned_zeros(shape, dtype) for name in cache_tensors(cache.layers)}


def rotate_pairs(keys: NDArray[np.generic], angles: NDArray[np.float64]) -> None:
    """Turn keys [..., D] in rotate-half layout by ``angles`` [D / 2], in place.

    The two channels of a pair share the scale of their integers, so int8 keys are turned as they are.
    """
    half = keys.shape[-1] // 2
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = keys[..., :half].astype(np.float32), keys[..., half:].astype(np.float32)
    turned = np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
    if keys.dtype == np.int8:
        turned = np.clip(np.rint(turned), -127, 127)
    keys[...] = turned
