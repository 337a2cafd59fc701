"""The Haar transform of the video tokenizer's network, by definition."""

from __future__ import annotations

import numpy as np
import torch

from diagd.export.tokenizers.cosmos_dv_network import analyse, synthesise


def level(video: np.ndarray) -> np.ndarray:
    """One level on [C, T, H, W] as published: split time, then height, then width, scaled to 1/8."""
    bands = [video]
    for axis in (1, 2, 3):
        split = []
        for band in bands:
            even, odd = (np.take(band, range(start, band.shape[axis], 2), axis=axis) for start in (0, 1))
            split += [(even + odd) / np.sqrt(2), (even - odd) / np.sqrt(2)]
        bands = split
    made: np.ndarray = np.concatenate(bands) / (2 * np.sqrt(2))
    return made


def test_bands_equal_two_published_levels() -> None:
    video = np.random.default_rng(0).uniform(-1, 1, (3, 9, 8, 16))
    expected = level(level(np.concatenate([video[:, :1]] * 3 + [video], axis=1)))
    found = analyse(torch.tensor(video).transpose(0, 1)).transpose(0, 1).numpy()
    assert found.shape == (192, 3, 2, 4)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_synthesis_inverts_analysis_exactly_on_integers() -> None:
    """Every coefficient is an integer over 64, so float32 makes no error at all."""
    video = torch.randint(-255, 256, (17, 3, 8, 12), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(synthesise(analyse(video)), video)
