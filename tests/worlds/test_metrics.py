from __future__ import annotations

import math

import numpy as np
import pytest
import scipy

from diagd.errors import UsageError
from worlds.metrics import Estimate, frechet_distance, principal_axes, psnr, ssim, tile_features


def test_estimate_states_mean_error_and_count() -> None:
    estimate = Estimate.of(np.array([1.0, 2.0, 3.0, np.nan, 6.0]))
    assert estimate.mean == 3.0
    assert estimate.error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert estimate.count == 4
    assert Estimate.of(np.array([np.nan])).count == 0


def test_a_ratio_is_one_of_means_with_the_error_of_what_is_left() -> None:
    others = np.array([1.0, 2.0, 3.0, 4.0])
    twice = Estimate.ratio(2 * others, others)
    assert (twice.mean, twice.error, twice.count) == (2.0, 0.0, 4)
    ratio = Estimate.ratio(np.array([1.0, 3.0, 2.0, 4.0]), others)
    assert ratio.mean == 1.0
    assert ratio.error == pytest.approx(math.sqrt(2 / 3) / 2.5 / 2)
    assert math.isnan(Estimate.ratio(others, 0 * others).mean)


def test_psnr_by_hand() -> None:
    truth = np.full((2, 16, 16, 3), 100, np.uint8)
    frames = truth.copy()
    frames[1] += 10
    assert psnr(frames, truth) == pytest.approx([10 * math.log10(255**2 * 12), 10 * math.log10(255**2 / 100)])


def test_ssim_against_an_independent_filter() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 256, (24, 30, 3), dtype=np.uint8)
    frame = np.clip(truth + random.normal(0, 25, truth.shape), 0, 255).astype(np.uint8)

    def blur(image: np.ndarray) -> np.ndarray:
        smooth = scipy.ndimage.gaussian_filter(image, (1.5, 1.5, 0), radius=(5, 5, 0))
        made: np.ndarray = smooth[5:-5, 5:-5]
        return made

    x, y = frame.astype(float), truth.astype(float)
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 2.55**2, 7.65**2
    expected = ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    assert ssim(frame, truth) == pytest.approx(expected, rel=1e-6)
    assert ssim(truth, truth) == pytest.approx(1.0)


def test_frechet_distance_against_a_matrix_square_root() -> None:
    random = np.random.default_rng(1)
    first = random.normal(size=(200, 5)) @ random.normal(size=(5, 5))
    second = random.normal(size=(150, 5)) @ random.normal(size=(5, 5)) + 1
    a, b = np.cov(first.T), np.cov(second.T)
    shift = first.mean(0) - second.mean(0)
    expected = shift @ shift + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-8)
    moved = first + np.array([3.0, 0, 0, 0, 0])
    assert frechet_distance(first, moved) == pytest.approx(9, abs=1e-8)


def test_frechet_distance_needs_more_samples_than_features() -> None:
    with pytest.raises(UsageError, match="generate more frames"):
        frechet_distance(np.zeros((4, 5)), np.zeros((40, 5)))


def test_tile_features_count_codes() -> None:
    tokens = np.array([[[0, 1], [1, 1]], [[2, 2], [2, 2]]])
    expected = np.array([[1, math.sqrt(3), 0, 0], [0, 0, 2, 0]])
    np.testing.assert_allclose(tile_features(tokens, 4, np.eye(4)), expected)


def test_principal_axes_are_the_directions_of_most_variance() -> None:
    tokens = np.random.default_rng(2).choice(6, (300, 3, 4), p=[0.4, 0.3, 0.15, 0.1, 0.05, 0])
    axes = principal_axes(tokens, 6, dimensions=2)
    counts = tile_features(tokens, 6, np.eye(6))
    _, singular, rows = np.linalg.svd(counts - counts.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(axes.T @ rows[:2].T), np.eye(2), atol=1e-6)
    assert singular[0] > singular[1]
