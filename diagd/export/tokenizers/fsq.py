"""Finite scalar quantisation (Mentzer et al. 2023, section 3): each channel is rounded to a few levels.

A token is a mixed-radix number whose first digit is the first channel. All arithmetic is float32, which is
exact on integers of this size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diagd.export.tokenizers.blocks import constant

# keeps the outermost levels reachable at finite latents
STRETCH = 1 + 1e-3


def tokens_of_latents(latents: Tensor, levels: Sequence[int]) -> Tensor:
    """Quantise latents ``[T, len(levels), h, w]`` to tokens int32 ``[T, h, w]``; halves round to even."""
    bounded = _bounded(latents.float(), levels)
    digits = bounded.round() + _channels([level // 2 for level in levels], bounded)
    return (digits * _channels(_place_values(levels), bounded)).sum(1).to(torch.int32)


def codes_of_latents(latents: Tensor, levels: Sequence[int]) -> Tensor:
    """The codes of `tokens_of_latents`, float32, with the gradient of the latents they were rounded from."""
    bounded = _bounded(latents.float(), levels)
    rounded = bounded + (bounded.round() - bounded).detach()
    return rounded / _channels([level // 2 for level in levels], bounded)


def codes_of_tokens(tokens: Tensor, levels: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Quantised latents ``[T, len(levels), h, w]`` in [-1, 1] of tokens int32 ``[T, h, w]``."""
    z = tokens.unsqueeze(1).float()
    radix, middle = _channels(levels, z), _channels([level // 2 for level in levels], z)
    quotient = (z / _channels(_place_values(levels), z)).floor()
    digits = quotient - (quotient / radix).floor() * radix
    return ((digits - middle) / middle).to(dtype)


def _bounded(z: Tensor, levels: Sequence[int]) -> Tensor:
    """Latents squeezed to the range of the digits, whose middle is 0."""
    halves = [(level - 1) * STRETCH / 2 for level in levels]
    offsets = [0.0 if level % 2 else 0.5 for level in levels]
    shifts = [math.atanh(offset / half) for offset, half in zip(offsets, halves, strict=True)]
    half, offset, shift = (_channels(values, z) for values in (halves, offsets, shifts))
    return (z + shift).tanh() * half - offset


def _place_values(levels: Sequence[int]) -> list[int]:
    return [math.prod(levels[:digit]) for digit in range(len(levels))]


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return constant(values, like).reshape(1, -1, 1, 1)
