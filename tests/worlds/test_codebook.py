from __future__ import annotations

import numpy as np
import pytest

from diagd.errors import UsageError
from tests.worlds.recordings import patch_encoder
from worlds.tokenizer import cut_patches, fit_codebook


def tiled(tiles: np.ndarray, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(0, len(tiles), shape)
    frames = tiles[ids].transpose(0, 1, 3, 2, 4, 5)
    return frames.reshape(shape[0], shape[1] * 4, shape[2] * 4, 3)


def coded(video: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """The nearest codes, in place of the patches."""
    rows, columns = (size // codebook.shape[1] for size in video.shape[1:3])
    tokens = patch_encoder(codebook, rows, columns).encode(video)
    made: np.ndarray = codebook.reshape(len(codebook), -1)[tokens.ravel()]
    return made


def test_enumerable_patches_are_kept_exactly() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    videos = [tiled(tiles, (6, 5, 7), seed) for seed in range(3)]
    codebook, used = fit_codebook(videos, codes=32, side=4)
    assert used == 20
    assert codebook.shape == (32, 4, 4, 3)
    assert {c.tobytes() for c in codebook} == {t.tobytes() for t in tiles}
    np.testing.assert_array_equal(coded(videos[1], codebook), cut_patches(videos[1], 4))


def test_most_frequent_codes_come_first() -> None:
    frames = np.zeros((1, 4, 12, 3), np.uint8)
    frames[:, :, 8:] = 200
    codebook, used = fit_codebook([frames], codes=4, side=4)
    assert used == 2
    assert (codebook[0] == 0).all()
    assert (codebook[1] == 200).all()


def test_more_patches_than_codes_are_clustered() -> None:
    random = np.random.default_rng(1)
    centres = random.integers(20, 236, (6, 4, 4, 3))
    noise = random.integers(-4, 5, (400, 4, 4, 3))
    patches = (centres[random.integers(0, 6, 400)] + noise).astype(np.uint8)
    video = patches.reshape(20, 1, 20, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(20, 4, 80, 3)
    codebook, used = fit_codebook([video], codes=12, side=4)
    assert 6 <= used <= 12
    assert np.abs(coded(video, codebook).astype(int) - cut_patches(video, 4)).max() <= 16


def test_fitting_is_deterministic() -> None:
    video = np.random.default_rng(2).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    first, second = (fit_codebook([video], codes=5, side=4, seed=7)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_frames_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match="10x8 pixels cannot be cut into 4x4"):
        cut_patches(np.zeros((1, 10, 8, 3), np.uint8), 4)
    with pytest.raises(UsageError, match="no frames"):
        fit_codebook([], codes=4, side=4)
