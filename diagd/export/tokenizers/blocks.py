"""Layers that the two-dimensional convolutional tokenizers have in common, and vector quantisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = 32
EPSILON = 1e-6


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation as all released VQGAN descendants have it."""
    return nn.GroupNorm(GROUPS, channels, eps=EPSILON)


class ResnetBlock(nn.Module):
    """norm, SiLU, 3x3, norm, SiLU, 3x3, plus the input.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        shortcut: name that the checkpoint gives to the 1x1 convolution of the input, which exists where the
            number of channels changes.
    """

    def __init__(self, in_channels: int, channels: int, shortcut: str) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = shortcut if in_channels != channels else None
        if self.shortcut is not None:
            self.add_module(self.shortcut, nn.Conv2d(in_channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, in_channels, H, W]`` to ``[T, channels, H, W]``."""
        hidden: Tensor = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        same: Tensor = x if self.shortcut is None else self.get_submodule(self.shortcut)(x)
        return same + hidden


class Downsample(nn.Module):
    """Half the size by a strided 3x3 convolution, padded on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, C, H, W]`` to ``[T, C, H / 2, W / 2]``."""
        smaller: Tensor = self.conv(functional.pad(x, (0, 1, 0, 1)))
        return smaller


class Upsample(nn.Module):
    """Twice the size by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, C, H, W]`` to ``[T, C, 2H, 2W]``."""
        larger: Tensor = self.conv(double_size(x))
        return larger


def double_size(x: Tensor) -> Tensor:
    """Nearest-neighbour enlargement ``[T, C, H, W]`` to ``[T, C, 2H, 2W]``."""
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def spatial_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Single-head attention among the cells of each image; all tensors ``[T, C, H, W]``, scale C^-0.5."""
    q, k, v = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (query, key, value))
    attended = functional.scaled_dot_product_attention(q, k, v)
    return attended.squeeze(1).transpose(1, 2).reshape(value.shape)


def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook row nearest to each vector by Euclidean distance, in float32; ties to the first.

    Args:
        latents: ``[..., D]``.
        codebook: ``[codes, D]``.

    Returns:
        int32 ``[...]``.
    """
    rows = codebook.float()
    # |z|^2 is the same for every code and would only cost precision
    distances = rows.square().sum(1) - 2 * latents.float() @ rows.T
    return distances.argmin(-1).to(torch.int32)


class Codebook(nn.Module):
    """The codes of a vector quantiser under the name that taming and diffusers give them.

    Args:
        codes: rows.
        width: values per row.
    """

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)

    def encode(self, latents: Tensor) -> Tensor:
        """Nearest codes of ``[T, D, h, w]``: int32 ``[T, h, w]``."""
        return nearest_code(latents.permute(0, 2, 3, 1), self.embedding.weight)

    def decode(self, tokens: Tensor) -> Tensor:
        """Codes ``[T, D, h, w]`` of int32 ``[T, h, w]``."""
        rows: Tensor = self.embedding(tokens)
        return rows.permute(0, 3, 1, 2)
