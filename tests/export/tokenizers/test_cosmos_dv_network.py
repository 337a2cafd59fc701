"""Parts of the video tokenizer's network: Haar transform and finite scalar quantisation, by definition."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diagd.export.tokenizers.cosmos_dv_network import analyse, codes_of_tokens, synthesise, tokens_of_latents

LEVELS = (8, 8, 8, 5, 5, 5)


def level(video: np.ndarray) -> np.ndarray:
    """One level on [C, T, H, W] as published: split time, then height, then width, scaled to 1/8."""
    bands = [video]
    for axis in (1, 2, 3):
        split = []
        for band in bands:
            even, odd = (np.take(band, range(start, band.shape[axis], 2), axis=axis) for start in (0, 1))
            split += [(even + odd) / np.sqrt(2), (even - odd) / np.sqrt(2)]
        bands = split
    return np.concatenate(bands) / (2 * np.sqrt(2))


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


def test_every_token_has_its_own_code_and_digits() -> None:
    tokens = torch.arange(math.prod(LEVELS), dtype=torch.int32).reshape(1, 1, -1)
    codes = codes_of_tokens(tokens, LEVELS, torch.float32)[0, :, 0]
    digits = np.stack(np.unravel_index(np.arange(64000), LEVELS, order="F"))
    middle = np.array([4, 4, 4, 2, 2, 2])[:, None]
    np.testing.assert_array_equal(codes.numpy(), ((digits - middle) / middle).astype(np.float32))


def test_codes_survive_quantisation() -> None:
    """A latent that bounds to a code's digits gives the token back."""
    tokens = np.arange(64000)
    digits = np.stack(np.unravel_index(tokens, LEVELS, order="F"))
    levels = np.array(LEVELS)[:, None]
    half, offset = (levels - 1) * 1.001 / 2, np.where(levels % 2, 0, 0.5)
    latents = np.arctanh((digits - levels // 2 + offset) / half) - np.arctanh(offset / half)
    found = tokens_of_latents(torch.tensor(latents, dtype=torch.float32)[None, :, None], LEVELS)
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found[0, 0].numpy(), tokens)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6))
def test_tokens_follow_the_definition(latent: list[float]) -> None:
    digits, near_half = [], False
    for z, level in zip(latent, LEVELS, strict=True):
        half = (level - 1) * (1 + 1e-3) / 2
        offset = 0.5 if level % 2 == 0 else 0.0
        bounded = math.tanh(z + math.atanh(offset / half)) * half - offset
        near_half |= abs(bounded % 1 - 0.5) < 1e-5
        digits.append(round(bounded) + level // 2)
    assert all(0 <= digit < level for digit, level in zip(digits, LEVELS, strict=True))
    token = sum(d * b for d, b in zip(digits, (1, 8, 64, 512, 2560, 12800), strict=True))
    found = tokens_of_latents(torch.tensor(latent).reshape(1, 6, 1, 1), LEVELS).item()
    assert near_half or found == token
