"""Fits the codebook of the patch tokenizer to frames: exact where patches can be enumerated, else k-means."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from diagd.errors import UsageError
from diagd.tuning.recordings import Patches, assign, cut_patches, index_distinct

_SAMPLE = 65_536
_ITERATIONS = 12


def fit_codebook(
    videos: Iterable[NDArray[np.uint8]], *, codes: int, side: int, seed: int = 0
) -> tuple[NDArray[np.uint8], int]:
    """Choose the codes for patches of ``videos``, each uint8 [T, H, W, 3].

    Returns:
        uint8 [codes, side, side, 3], most frequent first, and how many of them are in use; the rest repeat
        the first code, which as the lowest id always wins against them.

    Raises:
        UsageError: no frame at all.
    """
    patches, counts = _distinct(videos, side, seed)
    if len(patches) > codes:
        patches, counts = _k_means(patches, counts, codes, np.random.default_rng(seed))
    order = np.lexsort((*patches.T[::-1], -counts))
    used = patches[order]
    padding = np.repeat(used[:1], codes - len(used), axis=0)
    return np.concatenate([used, padding]).reshape(codes, side, side, 3), len(used)


def _distinct(videos: Iterable[NDArray[np.uint8]], side: int, seed: int) -> tuple[Patches, NDArray[np.int64]]:
    """Distinct patches and their counts; beyond ``_SAMPLE`` of them, a random sample."""
    random = np.random.default_rng(seed)
    patches, counts = np.zeros((0, side * side * 3), np.uint8), np.zeros(0, np.int64)
    for frames in videos:
        new, new_counts = _unique(cut_patches(frames, side), None)
        patches, counts = _unique(np.concatenate([patches, new]), np.concatenate([counts, new_counts]))
        if len(patches) > _SAMPLE:
            kept = np.sort(random.choice(len(patches), _SAMPLE, replace=False))
            patches, counts = patches[kept], counts[kept]
    if not len(patches):
        raise UsageError("no frames to fit a codebook to; the folder holds no episode")
    return patches, counts


def _unique(patches: Patches, weights: NDArray[np.int64] | None) -> tuple[Patches, NDArray[np.int64]]:
    first, inverse = index_distinct(patches)
    counts = np.bincount(inverse, weights=weights, minlength=len(first)).astype(np.int64)
    return patches[first], counts


def _k_means(
    patches: Patches, counts: NDArray[np.int64], codes: int, random: np.random.Generator
) -> tuple[Patches, NDArray[np.int64]]:
    """Lloyd's iterations on weighted patches; an empty cluster restarts at the worst-served patch."""
    points = patches.astype(np.float32)
    centres = points[random.choice(len(points), codes, replace=False, p=counts / counts.sum())]
    for _ in range(_ITERATIONS):
        nearest, distance = assign(points, centres)
        mass = np.bincount(nearest, weights=counts, minlength=codes)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, points * counts[:, None].astype(np.float32))
        filled = mass > 0
        centres[filled] = sums[filled] / mass[filled, None]
        worst = np.argsort(-distance * counts)[: codes - int(filled.sum())]
        centres[~filled] = points[worst]
    rounded = np.clip(np.rint(centres), 0, 255).astype(np.uint8)
    nearest, _ = assign(points, rounded.astype(np.float32))
    return _unique(rounded, np.bincount(nearest, weights=counts, minlength=codes).astype(np.int64))
