"""Code search and pixel conversion on inputs whose answer is exact."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diagd.export.tokenizers.vqgan_network import (
    constant,
    images_from_pixels,
    nearest_code,
    pixels_from_images,
)


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 6))
def test_nearest_code_is_exact_on_integers_and_ties_go_to_the_first(
    seed: int, codes: int, width: int
) -> None:
    rng = np.random.default_rng(seed)
    codebook, latents = rng.integers(-3, 4, (codes, width)), rng.integers(-3, 4, (2, 5, width))
    distances = ((latents[:, :, None] - codebook) ** 2).sum(-1)
    found = nearest_code(torch.tensor(latents).half(), torch.tensor(codebook).half())
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found.numpy(), distances.argmin(-1))


def test_pixels_are_truncated_not_rounded() -> None:
    images = torch.tensor([0.0, 0.99, 1.0, 127.5, 254.999, 255.0]).reshape(1, 3, 1, 2)
    assert pixels_from_images(images).flatten().tolist() == [0, 1, 254, 0, 127, 255]


def test_pixels_survive_a_round_trip() -> None:
    pixels = torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).reshape(2, 4, 6, 3)
    images = images_from_pixels(pixels, torch.float16)
    assert images.shape == (2, 3, 4, 6)
    assert torch.equal(pixels_from_images(images), pixels)


def test_constants_follow_the_tensor_they_meet() -> None:
    like = torch.zeros((), dtype=torch.float16, device="meta")
    assert constant([1.0, 2.0], like).device == like.device
    assert constant([1.0, 2.0], torch.zeros((), dtype=torch.float16)).tolist() == [1.0, 2.0]
