"""Layers of a causal video network on ``[T, C, H, W]``.

Frames are the leading axis, so that spatial layers treat every frame by itself without moving data; temporal
layers see the current and earlier frames only. Submodules carry the names of the released Cosmos tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from diagd.export.tokenizers.blocks import EPSILON, double_size, spatial_attention


class FrameConv(nn.Module):
    """Convolution within each frame; its kernel is one frame deep."""

    def __init__(
        self, in_channels: int, channels: int, size: int, *, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(
            in_channels, channels, (1, size, size), stride=(1, stride, stride), padding=(0, padding, padding)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, in_channels, H, W]`` to ``[T, channels, H', W']``."""
        convolved: Tensor = self.conv3d(x.unsqueeze(2))
        return convolved.squeeze(2)


class TimeConv(nn.Module):
    """Convolution of three frames up to the current one; the first frame stands in for those before it."""

    def __init__(self, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.past = 3 - stride
        self.conv3d = nn.Conv3d(channels, channels, (3, 1, 1), stride=(stride, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, C, H, W]`` to ``[T / stride, C, H, W]``."""
        video = torch.cat([x[:1]] * self.past + [x]).transpose(0, 1).unsqueeze(0)
        convolved: Tensor = self.conv3d(video)
        return convolved.squeeze(0).transpose(0, 1)


def factorised(in_channels: int, channels: int) -> nn.Sequential:
    """3x3 within frames, then three frames in time."""
    return nn.Sequential(FrameConv(in_channels, channels, 3, padding=1), TimeConv(channels))


class FrameNorm(nn.Module):
    """Normalisation over all channels and pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, C, H, W]`` to itself."""
        normed: Tensor = self.norm(x)
        return normed


class ResnetBlock(nn.Module):
    """norm, SiLU, factorised convolution, twice, plus the input."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(in_channels)
        self.conv1 = factorised(in_channels, channels)
        self.norm2 = FrameNorm(channels)
        self.conv2 = factorised(channels, channels)
        self.nin_shortcut = FrameConv(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, in_channels, H, W]`` to ``[T, channels, H, W]``."""
        hidden: Tensor = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        same: Tensor = self.nin_shortcut(x)
        return same + hidden


class Attention(nn.Module):
    """Single-head attention, added to its input.

    Args:
        channels: width of queries, keys and values.
        attend: maps query, key and value ``[T, C, H, W]`` to the mixed values.
    """

    def __init__(self, channels: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.norm = FrameNorm(channels)
        self.q = FrameConv(channels, channels, 1)
        self.k = FrameConv(channels, channels, 1)
        self.v = FrameConv(channels, channels, 1)
        self.proj_out = FrameConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, C, H, W]`` to itself."""
        normed = self.norm(x)
        mixed: Tensor = self.proj_out(self.attend(self.q(normed), self.k(normed), self.v(normed)))
        return x + mixed


def temporal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Single-head causal attention along time at each pixel; all tensors ``[T, C, H, W]``."""
    q, k, v = (x.flatten(2).permute(2, 0, 1).unsqueeze(1) for x in (query, key, value))
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.squeeze(1).permute(1, 2, 0).reshape(value.shape)


class Middle(nn.Module):
    """The coarsest level: block, attention in space and then in time, block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = nn.Sequential(
            Attention(channels, spatial_attention), Attention(channels, temporal_attention)
        )
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, C, H, W]`` to itself."""
        mixed: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return mixed


class Downsample(nn.Module):
    """Half the size, and optionally half the time, each as a strided convolution plus an average."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.conv1 = FrameConv(channels, channels, 3, stride=2)
        self.conv2 = TimeConv(channels, stride=2) if time else None
        self.conv3 = FrameConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, C, H, W]`` to ``[T', C, H / 2, W / 2]``, T' = (T + 1) / 2 or T."""
        x = self.conv1(functional.pad(x, (0, 1, 0, 1))) + functional.avg_pool2d(x, 2)
        if self.conv2 is not None:
            x = torch.cat([x[:1], x])
            x = self.conv2(x) + (x[:-1:2] + x[1::2]) / 2
        smaller: Tensor = self.conv3(x)
        return smaller


class Upsample(nn.Module):
    """Optionally twice the time, then twice the size, each by repetition plus its convolution."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.conv1 = TimeConv(channels) if time else None
        self.conv2 = FrameConv(channels, channels, 3, padding=1)
        self.conv3 = FrameConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, C, H, W]`` to ``[T', C, 2H, 2W]``, T' = 2T - 1 or T."""
        if self.conv1 is not None:
            x = torch.stack([x, x], 1).flatten(0, 1)[1:]
            x = self.conv1(x) + x
        x = double_size(x)
        larger: Tensor = self.conv3(self.conv2(x) + x)
        return larger
