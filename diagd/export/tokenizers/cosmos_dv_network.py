"""The network of the discrete video tokenizer of Cosmos."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from diagd.export.tokenizers import fsq, haar
from diagd.export.tokenizers.causal import (
    Downsample,
    FrameConv,
    FrameNorm,
    Middle,
    ResnetBlock,
    Upsample,
    factorised,
)
from diagd.export.tokenizers.cosmos_dv import CosmosDvConfig
from diagd.export.tokenizers.pixels import images_from_pixels, pixels_from_images


class _Level(nn.Module):
    """Residual blocks of one resolution."""

    def __init__(self, in_channels: int, channels: int, blocks: int) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class _DownLevel(_Level):
    def __init__(self, in_channels: int, channels: int, blocks: int, downsample: Downsample | None) -> None:
        super().__init__(in_channels, channels, blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.downsample is None else self.downsample(x)


class _UpLevel(_Level):
    def __init__(self, in_channels: int, channels: int, blocks: int, upsample: Upsample | None) -> None:
        super().__init__(in_channels, channels, blocks)
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.upsample is None else self.upsample(x)


class _EncoderNetwork(nn.Module):
    def __init__(self, config: CosmosDvConfig) -> None:
        super().__init__()
        channels = config.channels
        before = (config.stem_channels, *channels)
        self.conv_in = factorised(haar.CHANNELS, config.stem_channels)
        self.down = nn.ModuleList(
            _DownLevel(
                before[level],
                width,
                config.res_blocks,
                Downsample(width, time=level == 0) if level < len(channels) - 1 else None,
            )
            for level, width in enumerate(channels)
        )
        self.mid = Middle(channels[-1])
        self.norm_out = FrameNorm(channels[-1])
        self.conv_out = factorised(channels[-1], config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        latents: Tensor = self.conv_out(functional.silu(self.norm_out(self.mid(x))))
        return latents


class _DecoderNetwork(nn.Module):
    def __init__(self, config: CosmosDvConfig) -> None:
        super().__init__()
        channels = config.channels
        before = (*channels[1:], channels[-1])
        self.conv_in = factorised(config.latent_channels, channels[-1])
        self.mid = Middle(channels[-1])
        self.up = nn.ModuleList(
            _UpLevel(
                before[level],
                width,
                config.res_blocks + 1,
                Upsample(width, time=level == 1) if level > 0 else None,
            )
            for level, width in enumerate(channels)
        )
        self.norm_out = FrameNorm(channels[0])
        self.conv_out = factorised(channels[0], haar.CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        bands: Tensor = self.conv_out(functional.silu(self.norm_out(x)))
        return bands


class Encoder(nn.Module):
    """Pixels to tokens."""

    def __init__(self, config: CosmosDvConfig) -> None:
        super().__init__()
        self.levels = config.levels
        self.encoder = _EncoderNetwork(config)
        self.quant_conv = FrameConv(config.latent_channels, len(config.levels), 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels uint8 ``[1 + 8n, H, W, 3]`` to tokens int32 ``[1 + n, H / 16, W / 16]``."""
        video = images_from_pixels(pixels, self.quant_conv.conv3d.weight.dtype) / 127.5 - 1
        latents = self.quant_conv(self.encoder(haar.analyse(video)))
        return fsq.tokens_of_latents(latents, self.levels)


class Decoder(nn.Module):
    """Tokens to pixels."""

    def __init__(self, config: CosmosDvConfig) -> None:
        super().__init__()
        self.levels = config.levels
        self.post_quant_conv = FrameConv(len(config.levels), config.latent_channels, 1)
        self.decoder = _DecoderNetwork(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int32 ``[1 + n, h, w]`` to pixels uint8 ``[1 + 8n, 16h, 16w, 3]``."""
        codes = fsq.codes_of_tokens(tokens, self.levels, self.post_quant_conv.conv3d.weight.dtype)
        video = haar.synthesise(self.decoder(self.post_quant_conv(codes)))
        return pixels_from_images((video * 0.5 + 0.5).clamp(0, 1) * 255)
