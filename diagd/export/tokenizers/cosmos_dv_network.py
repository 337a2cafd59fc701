"""The network of the discrete video tokenizer of Cosmos: Haar transform, causal VQGAN, scalar quantisation.

Frames are the leading axis, so that spatial layers treat every frame by itself without moving data; temporal
layers see the current and earlier frames only.

Two levels of a three-dimensional Haar transform are one strided convolution: each takes sums and differences
along time, height and width. Cosmos scales a level by (1/sqrt 2)^3 and divides by 2 sqrt 2, which is 1/8
exactly, so the inverse has coefficients of +1 and -1.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from diagd.export.families.cosmos import HAAR_SIDE, CosmosDvConfig
from diagd.export.tokenizers import vqgan_network as vqgan

COLOURS = 3
BANDS = COLOURS * HAAR_SIDE**3


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


def temporal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Single-head causal attention along time at each pixel; all tensors ``[T, C, H, W]``."""
    q, k, v = (x.flatten(2).permute(2, 0, 1).unsqueeze(1) for x in (query, key, value))
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.squeeze(1).permute(1, 2, 0).reshape(value.shape)


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
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        larger: Tensor = self.conv3(self.conv2(x) + x)
        return larger


LAYERS = vqgan.Layers(  # norms are over all channels and pixels of each frame
    norm=lambda channels: nn.Sequential(OrderedDict(norm=nn.GroupNorm(1, channels, eps=vqgan.EPSILON))),
    conv=factorised,
    point=lambda inputs, outputs: FrameConv(inputs, outputs, 1),
    down=lambda channels, level: Downsample(channels, time=level == 0),
    up=lambda channels, level: Upsample(channels, time=level == 0),
)
MIDDLE = (vqgan.spatial_attention, temporal_attention)


class Encoder(nn.Module):
    """Pixels to tokens."""

    def __init__(self, config: CosmosDvConfig) -> None:
        super().__init__()
        self.levels = config.levels
        self.encoder = vqgan.encoder_network(LAYERS, config, BANDS, MIDDLE)
        self.quant_conv = FrameConv(config.latent_channels, len(config.levels), 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels uint8 ``[1 + 8n, H, W, 3]`` to tokens int32 ``[1 + n, H / 16, W / 16]``."""
        video = vqgan.scaled_images(pixels, self.quant_conv.conv3d.weight)
        latents = self.quant_conv(self.encoder(analyse(video)))
        return vqgan.tokens_of_latents(latents, self.levels)


class Decoder(nn.Module):
    """Tokens to pixels."""

    def __init__(self, config: CosmosDvConfig) -> None:
        super().__init__()
        self.levels = config.levels
        self.post_quant_conv = FrameConv(len(config.levels), config.latent_channels, 1)
        self.decoder = vqgan.decoder_network(LAYERS, config, BANDS, MIDDLE)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int32 ``[1 + n, h, w]`` to pixels uint8 ``[1 + 8n, 16h, 16w, 3]``."""
        codes = vqgan.codes_of_tokens(tokens, self.levels, self.post_quant_conv.conv3d.weight.dtype)
        video = synthesise(self.decoder(self.post_quant_conv(codes)))
        return vqgan.pixels_from_images((video * 0.5 + 0.5).clamp(0, 1) * 255)


def haar_basis() -> NDArray[np.float64]:
    """Signs ``[192, 3, 4, 4, 4]`` (band, colour, t, y, x).

    Bands are ordered by second level (t, y, x), first level (t, y, x), colour; low before high.
    """
    pair = np.array([[1.0, 1.0], [1.0, -1.0]])
    # second-level bands abc look at pairs ghi of first-level results, whose bands def look at pixels jkl
    signs: NDArray[np.float64] = np.einsum(
        "ag,bh,ci,dj,ek,fl,xy->abcdefxygjhkil", *[pair] * 6, np.eye(COLOURS)
    )
    return signs.reshape(BANDS, COLOURS, HAAR_SIDE, HAAR_SIDE, HAAR_SIDE)


def analyse(video: Tensor) -> Tensor:
    """Bands ``[(T + 3) / 4, 192, H / 4, W / 4]`` of ``[T, 3, H, W]``, whose first frame counts four times."""
    padded = torch.cat([video[:1]] * (HAAR_SIDE - 1) + [video])
    kernel = vqgan.constant(haar_basis() / HAAR_SIDE**3, video)
    # a missing bias is exported as one that ONNX Runtime rejects unless constants are folded
    bias = vqgan.constant(np.zeros(BANDS), video)
    bands = functional.conv3d(padded.transpose(0, 1).unsqueeze(0), kernel, bias, stride=HAAR_SIDE)
    return bands.squeeze(0).transpose(0, 1)


def synthesise(bands: Tensor) -> Tensor:
    """The inverse: ``[t, 192, h, w]`` to ``[4t - 3, 3, 4h, 4w]``."""
    kernel = vqgan.constant(haar_basis(), bands)
    bias = vqgan.constant(np.zeros(COLOURS), bands)
    x, none = bands.transpose(0, 1).unsqueeze(0), (0,) * 3
    video: Tensor = torch.ops.aten.convolution.default(
        x, kernel, bias, (HAAR_SIDE,) * 3, none, (1,) * 3, True, none, 1
    )
    return video.squeeze(0).transpose(0, 1)[HAAR_SIDE - 1 :]
