"""The network of the taming-transformers VQGAN."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import silu

from diagd.export.tokenizers.blocks import (
    Codebook,
    Downsample,
    ResnetBlock,
    Upsample,
    group_norm,
    spatial_attention,
)
from diagd.export.tokenizers.pixels import images_from_pixels, pixels_from_images
from diagd.export.tokenizers.taming_vq import TamingVqConfig


class _Attention(nn.Module):
    """Single-head attention among the cells of each image, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        mixed: Tensor = self.proj_out(spatial_attention(self.q(normed), self.k(normed), self.v(normed)))
        return x + mixed


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = _block(channels, channels)
        self.attn_1 = _Attention(channels)
        self.block_2 = _block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return mixed


class _Level(nn.Module):
    """Blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, in_channels: int, channels: int, blocks: int, *, attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * blocks
        self.block = nn.ModuleList(_block(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(_Attention(channels) if attention else nn.Identity() for _ in self.block)

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.block, self.attn, strict=True):
            x = attention(block(x))
        return x


class _DownLevel(_Level):
    def __init__(
        self, in_channels: int, channels: int, blocks: int, *, attention: bool, resample: bool
    ) -> None:
        super().__init__(in_channels, channels, blocks, attention=attention)
        self.downsample = Downsample(channels) if resample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        smaller: Tensor = self.downsample(super().forward(x))
        return smaller


class _UpLevel(_Level):
    def __init__(
        self, in_channels: int, channels: int, blocks: int, *, attention: bool, resample: bool
    ) -> None:
        super().__init__(in_channels, channels, blocks, attention=attention)
        self.upsample = Upsample(channels) if resample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        larger: Tensor = self.upsample(super().forward(x))
        return larger


class _EncoderNetwork(nn.Module):
    def __init__(self, config: TamingVqConfig) -> None:
        super().__init__()
        channels = config.channels
        before = (config.stem_channels, *channels)
        self.conv_in = nn.Conv2d(3, config.stem_channels, 3, padding=1)
        self.down = nn.ModuleList(
            _DownLevel(
                before[level],
                width,
                config.res_blocks,
                attention=level in config.attention_levels,
                resample=level < len(channels) - 1,
            )
            for level, width in enumerate(channels)
        )
        self.mid = _Middle(channels[-1])
        self.norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        latents: Tensor = self.conv_out(silu(self.norm_out(self.mid(x))))
        return latents


class _DecoderNetwork(nn.Module):
    def __init__(self, config: TamingVqConfig) -> None:
        super().__init__()
        channels = config.channels
        before = (*channels[1:], channels[-1])
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = _Middle(channels[-1])
        self.up = nn.ModuleList(
            _UpLevel(
                before[level],
                width,
                config.res_blocks + 1,
                attention=level in config.attention_levels,
                resample=level > 0,
            )
            for level, width in enumerate(channels)
        )
        self.norm_out = group_norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        images: Tensor = self.conv_out(silu(self.norm_out(x)))
        return images


class Encoder(nn.Module):
    """Pixels to tokens."""

    def __init__(self, config: TamingVqConfig) -> None:
        super().__init__()
        self.encoder = _EncoderNetwork(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.quantize = Codebook(config.codes, config.code_width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels uint8 ``[T, H, W, 3]`` to tokens int32 ``[T, h, w]``."""
        images = images_from_pixels(pixels, self.quant_conv.weight.dtype) / 127.5 - 1
        return self.quantize.encode(self.quant_conv(self.encoder(images)))


class Decoder(nn.Module):
    """Tokens to pixels."""

    def __init__(self, config: TamingVqConfig) -> None:
        super().__init__()
        self.quantize = Codebook(config.codes, config.code_width)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)
        self.decoder = _DecoderNetwork(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int32 ``[T, h, w]`` to pixels uint8 ``[T, H, W, 3]``."""
        images = self.decoder(self.post_quant_conv(self.quantize.decode(tokens)))
        return pixels_from_images((images.clamp(-1, 1) + 1) * 127.5)


def _block(in_channels: int, channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, channels, "nin_shortcut")
