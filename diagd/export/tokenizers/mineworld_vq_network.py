"""The network of MineWorld's image tokenizer."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import silu

from diagd.export.tokenizers.blocks import Codebook, Downsample, ResnetBlock, Upsample, group_norm
from diagd.export.tokenizers.mineworld_vq import MineworldVqConfig
from diagd.export.tokenizers.pixels import images_from_pixels, pixels_from_images


class _Blocks(nn.Module):
    """Residual blocks in a row, ``[T, widths[0], H, W]`` to ``[T, widths[-1], H, W]``."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b, "conv_shortcut") for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x


class _DownLevel(_Blocks):
    def __init__(self, in_channels: int, channels: int, blocks: int, *, resample: bool) -> None:
        super().__init__([in_channels] + [channels] * blocks)
        self.downsamplers = nn.ModuleList([Downsample(channels)] if resample else [])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class _UpLevel(_Blocks):
    def __init__(self, in_channels: int, channels: int, blocks: int, *, resample: bool) -> None:
        super().__init__([in_channels] + [channels] * blocks)
        self.upsamplers = nn.ModuleList([Upsample(channels)] if resample else [])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class _EncoderNetwork(nn.Module):
    def __init__(self, config: MineworldVqConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _DownLevel(
                channels[max(level - 1, 0)], width, config.res_blocks, resample=level < len(channels) - 1
            )
            for level, width in enumerate(channels)
        )
        self.mid_block = _Blocks([channels[-1]] * 3)
        self.conv_norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        latents: Tensor = self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))
        return latents


class _DecoderNetwork(nn.Module):
    def __init__(self, config: MineworldVqConfig) -> None:
        super().__init__()
        channels = config.channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = _Blocks([channels[0]] * 3)
        self.up_blocks = nn.ModuleList(
            _UpLevel(
                channels[max(level - 1, 0)], width, config.res_blocks + 1, resample=level < len(channels) - 1
            )
            for level, width in enumerate(channels)
        )
        self.conv_norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        images: Tensor = self.conv_out(silu(self.conv_norm_out(x)))
        return images


class Encoder(nn.Module):
    """Pixels to tokens."""

    def __init__(self, config: MineworldVqConfig) -> None:
        super().__init__()
        self.encoder = _EncoderNetwork(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.quantize = Codebook(config.codes, config.latent_channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels uint8 ``[T, H, W, 3]`` to tokens int32 ``[T, H / 16, W / 16]``."""
        images = (images_from_pixels(pixels, self.quant_conv.weight.dtype) / 255 - 0.5) / 0.5
        return self.quantize.encode(self.quant_conv(self.encoder(images)))


class Decoder(nn.Module):
    """Tokens to pixels."""

    def __init__(self, config: MineworldVqConfig) -> None:
        super().__init__()
        self.quantize = Codebook(config.codes, config.latent_channels)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = _DecoderNetwork(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int32 ``[T, h, w]`` to pixels uint8 ``[T, 16h, 16w, 3]``."""
        images = self.decoder(self.post_quant_conv(self.quantize.decode(tokens)))
        return pixels_from_images((images.clamp(-1, 1) + 1) / 2 * 255)
