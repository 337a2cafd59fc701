"""Distances between frames and between sets of frames, with standard errors; and the user's own.

A metric network of the user's is any ONNX file whose inputs are float32 pictures in 0..1: one input
[N, 3, H, W] -> [N, D] gives features of frames (FID), one input [N, 3, T, H, W] -> [N, D] features of clips
(FVD), two inputs [N, 3, H, W] -> [N, ...] the distance of two frames (LPIPS). None is shipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diagd.errors import UsageError
from diagd.runtime.decoders.draft import as_floats, open_network

_SSIM_WINDOW = 11
_ROUNDING_NOISE = 1 / 12
_BATCH = 16


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

    @classmethod
    def ratio(cls, samples: NDArray[np.floating], others: NDArray[np.floating]) -> Estimate:
        """Ratio of the means of paired samples [n]; NaN where the second is 0.

        The error is that of the linearised ratio (Cochran 1977, section 6.4).
        """
        if not others.mean():
            return cls(float("nan"), float("nan"), len(others))
        value = samples.mean() / others.mean()
        return cls(float(value), cls.of((samples - value * others) / others.mean()).error, len(samples))


def psnr(frames: NDArray[np.uint8], truth: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of uint8 frames [..., H, W, 3], dB [...].

    Equal frames score 58.9 dB, the noise of rounding to 8 bits.
    """
    error = ((frames.astype(np.float64) - truth) ** 2).mean((-3, -2, -1))
    ratio: NDArray[np.float64] = 10 * np.log10(255**2 / np.maximum(error, _ROUNDING_NOISE))
    return ratio


def ssim(frames: NDArray[np.uint8], truth: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Structural similarity of uint8 frames [..., H, W, 3], averaged over pixels and channels, [...].

    Wang et al. 2004: Gaussian window of 11 pixels, standard deviation 1.5; NaN for frames smaller than that.
    """
    from skimage.metrics import structural_similarity

    height, width, _ = frames.shape[-3:]
    if min(height, width) < _SSIM_WINDOW:
        return np.full(frames.shape[:-3], np.nan)
    pairs = zip(frames.reshape(-1, height, width, 3), truth.reshape(-1, height, width, 3), strict=True)
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    found = [structural_similarity(x, y, data_range=255, channel_axis=-1, **gaussian) for x, y in pairs]
    return np.reshape(found, frames.shape[:-3])


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
    a, b = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second))
    shift = first.mean(0) - second.mean(0)
    # The trace of the root of a @ b, whose eigenvalues are real and not negative but for rounding.
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return float(shift @ shift + np.trace(a) + np.trace(b) - 2 * root)


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


class MetricNetwork:
    """An ONNX file run on the CPU.

    Raises:
        UsageError: the file cannot be loaded, or its inputs are of another kind.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        self._session = open_network(path, "network", threads)
        inputs = self._session.get_inputs()
        self._names = [value.name for value in inputs]
        ranks = [len(value.shape) for value in inputs]
        if ranks not in ([4], [5], [4, 4]):
            raise UsageError(
                f"{path} has inputs of rank {ranks}; expected [N, 3, H, W] or [N, 3, T, H, W], "
                "or two of the first"
            )
        self.takes_clips, self.takes_pairs = ranks == [5], len(ranks) == 2

    def features(self, clips: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Features [n, D] of clips uint8 [B, T, H, W, 3]: n = B for a network of clips, else B * T."""
        pictures = _channels_first(clips) if self.takes_clips else _channels_first(_flat(clips))
        outputs = self._run(pictures)
        return outputs.reshape(len(outputs), -1)

    def distances(self, clips: NDArray[np.uint8], truth: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Distances [B, T] of the frames of two sets of clips uint8 [B, T, H, W, 3]."""
        outputs = self._run(_channels_first(_flat(clips)), _channels_first(_flat(truth)))
        distances: NDArray[np.float64] = outputs.reshape(*clips.shape[:2], -1).mean(-1)
        return distances

    def _run(self, *pictures: NDArray[np.float32]) -> NDArray[np.float64]:
        parts = []
        for start in range(0, len(pictures[0]), _BATCH):
            feed = (picture[start : start + _BATCH] for picture in pictures)
            parts.append(self._session.run(None, dict(zip(self._names, feed, strict=True)))[0])
        return np.concatenate(parts).astype(np.float64)


def _flat(clips: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return clips.reshape(-1, *clips.shape[2:])


def _channels_first(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(as_floats(np.moveaxis(pictures, -1, 1)))
