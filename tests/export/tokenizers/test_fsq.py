"""Finite scalar quantisation against its definition, digit by digit."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diagd.export.tokenizers.vqgan_network import codes_of_latents, codes_of_tokens, tokens_of_latents

LEVELS = (8, 8, 8, 5, 5, 5)


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


@settings(max_examples=200)
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


def test_training_sees_the_codes_of_the_tokens_and_the_gradient_of_the_latents() -> None:
    latents = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    codes = codes_of_latents(latents, LEVELS)
    expected = codes_of_tokens(tokens_of_latents(latents, LEVELS), LEVELS, torch.float32)
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-6)
    (slopes,) = torch.autograd.grad(codes.sum(), latents)
    half, level = (8 - 1) * 1.001 / 2, latents[:, :3].detach()
    squeezed = torch.tanh(level + math.atanh(0.5 / half))
    torch.testing.assert_close(slopes[:, :3], half * (1 - squeezed**2) / 4)
