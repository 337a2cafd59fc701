"""Distances between frames and between sets of frames, with standard errors. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diagd.errors import UsageError

_SSIM_WINDOW, _SSIM_DEVIATION = 11, 1.5
_ROUNDING_NOISE = 1 / 12


@dataclass(frozen=True)
class Estimate:
    """A mean over independent samples, its standard error and their number."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, samples: NDArray[np.floating]) -> Estimate:
        """Estimate from samples [n]; NaN marks a sample that has nothing to say."""
        values = samples[~np.isnan(samples)]
        if not len(values):
            return cls(float("nan"), float("nan"), 0)
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        return cls(float(values.mean()), float(error), len(values))


def psnr(frames: NDArray[np.uint8], truth: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of uint8 frames [..., H, W, 3], dB [...].

    Equal frames score 58.9 dB, the noise of rounding to 8 bits.
    """
    error = ((frames.astype(np.float64) - truth) ** 2).mean((-3, -2, -1))
    ratio: NDArray[np.float64] = 10 * np.log10(255**2 / np.maximum(error, _ROUNDING_NOISE))
    return ratio


def ssim(frames: NDArray[np.uint8], truth: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Structural similarity of uint8 frames [..., H, W, 3], averaged over pixels and channels, [...].

    Wang et al. 2004: Gaussian window of 11 pixels, standard deviation 1.5.
    """
    x, y = frames.astype(np.float64), truth.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    similarity: NDArray[np.float64] = (above / below).mean((-3, -2, -1))
    return similarity


def frechet_distance(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Squared Frechet distance of Gaussians fitted to features [n, d] and [m, d] (Heusel et al. 2017, eq. 6).

    Raises:
        UsageError: fewer samples than dimensions, whose covariance would be singular.
    """
    for features in (first, second):
        if len(features) <= features.shape[1]:
            raise UsageError(
                f"a Frechet distance over {features.shape[1]} features needs more than that many samples, "
                f"got {len(features)}; generate more frames"
            )
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = _square_root(np.atleast_2d(a))
    cross = np.linalg.eigvalsh(root @ np.atleast_2d(b) @ root)
    shift = first.mean(0) - second.mean(0)
    covariances = np.trace(np.atleast_2d(a)) + np.trace(np.atleast_2d(b))
    return float(shift @ shift + covariances - 2 * np.sqrt(np.maximum(cross, 0)).sum())


def tile_features(tokens: NDArray[np.integer], codes: int, axes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Features [n, d] of frames int [n, h, w]: root counts of each code, projected on ``axes`` [codes, d]."""
    flat = tokens.reshape(len(tokens), -1).astype(np.int64)
    index = np.arange(len(flat))[:, None] * codes + flat
    counts = np.bincount(index.ravel(), minlength=len(flat) * codes).reshape(len(flat), codes)
    features: NDArray[np.float64] = np.sqrt(counts) @ axes
    return features


def principal_axes(tokens: NDArray[np.integer], codes: int, dimensions: int = 32) -> NDArray[np.float64]:
    """Principal axes [codes, dimensions] of the root code counts of frames int [n, h, w]."""
    counts = tile_features(tokens, codes, np.eye(codes))
    _, axes = np.linalg.eigh(np.cov(counts, rowvar=False))
    return axes[:, : -dimensions - 1 : -1]


def _square_root(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return root


def _blur(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian window over the valid part of [..., H, W, 3]."""
    offsets = np.arange(_SSIM_WINDOW) - _SSIM_WINDOW // 2
    kernel = np.exp(-(offsets**2) / (2 * _SSIM_DEVIATION**2))
    kernel /= kernel.sum()
    for axis in (-3, -2):
        windows = np.lib.stride_tricks.sliding_window_view(images, _SSIM_WINDOW, axis=axis)
        images = windows @ kernel
    return images
