"""Fits the codebook of the patch tokenizer to frames: exact where patches can be enumerated, else k-means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans

from diagd.errors import UsageError

_SAMPLE, _BATCH = 65_536, 4096

Patches = Counter[bytes]
"""How often each distinct patch occurs, uint8 [p, p, 3] as bytes."""


def fit_codebook(
    videos: Iterable[NDArray[np.uint8]], *, codes: int, side: int, seed: int = 0, exact: bool = False
) -> tuple[NDArray[np.uint8], int] | None:
    """Choose the codes for patches of ``videos``, each uint8 [T, H, W, 3].

    Returns:
        uint8 [codes, side, side, 3], most frequent first, and how many of them are in use; the rest repeat
        the first code, which as the lowest id always wins against them. None if they had to be ``exact`` and
        there are more patches than codes.

    Raises:
        UsageError: no frame at all, or frames that are not made of whole patches.
    """
    patches = _count(videos, side, np.random.default_rng(seed), codes if exact else None)
    if patches is None:
        return None
    if len(patches) > codes:
        patches = _cluster(patches, codes, seed)
    used = sorted(patches, key=lambda patch: (-patches[patch], patch))
    flat = np.frombuffer(b"".join(used + used[:1] * (codes - len(used))), np.uint8)
    return flat.reshape(codes, side, side, 3).copy(), len(used)


def cut_patches(frames: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Cut uint8 [T, H, W, 3] into uint8 [T * H/side * W/side, side * side * 3], in raster order.

    Raises:
        UsageError: the frame size is no multiple of ``side``.
    """
    count, height, width, _ = frames.shape
    if height % side or width % side:
        raise UsageError(
            f"frames of {height}x{width} pixels cannot be cut into {side}x{side} patches; resize them"
        )
    grid = frames.reshape(count, height // side, side, width // side, side, 3)
    return np.ascontiguousarray(grid.transpose(0, 1, 3, 2, 4, 5)).reshape(-1, side * side * 3)


def _count(
    videos: Iterable[NDArray[np.uint8]], side: int, random: np.random.Generator, most: int | None
) -> Patches | None:
    """Distinct patches; None beyond ``most`` of them, a random sample beyond ``_SAMPLE``."""
    patches: Patches = Counter()
    for frames in videos:
        patches.update(patch.tobytes() for patch in cut_patches(frames, side))
        if most is not None and len(patches) > most:
            return None
        if len(patches) > _SAMPLE:
            known = list(patches.items())
            patches = Counter(dict(known[n] for n in random.choice(len(known), _SAMPLE, replace=False)))
    if not patches:
        raise UsageError("no frames to fit a codebook to; the folder holds no episode")
    return patches


def _cluster(patches: Patches, codes: int, seed: int) -> Patches:
    """The centres of k-means, rounded to pixels, with the number of patches that each one stands for."""
    points = np.frombuffer(b"".join(patches), np.uint8).reshape(len(patches), -1).astype(np.float32)
    weights = np.fromiter(patches.values(), np.float64)
    fitted = MiniBatchKMeans(codes, random_state=seed, batch_size=_BATCH, n_init=1)
    nearest = fitted.fit_predict(points, sample_weight=weights)
    centres = np.rint(fitted.cluster_centers_).clip(0, 255).astype(np.uint8)
    found: Patches = Counter()
    for centre, count in zip(centres, np.bincount(nearest, weights, codes).astype(int).tolist(), strict=True):
        found[centre.tobytes()] += count
    return +found  # without the centres that nothing is near to
