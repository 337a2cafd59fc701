"""The network of the VQGAN tokenizers."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from diagd.export.tokenizers.blocks import (
    EPSILON,
    GROUPS,
    Layers,
    decoder_network,
    encoder_network,
    nearest_code,
    pixels_from_images,
    scaled_images,
    spatial_attention,
)
from diagd.export.tokenizers.vqgan import VqganConfig


def downsample(channels: int) -> nn.Module:
    """Half the size by a strided 3x3 convolution, padded on the right and at the bottom only."""
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def upsample(channels: int) -> nn.Module:
    """Twice the size by repetition, then a 3x3 convolution."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(larger=nn.Upsample(scale_factor=2.0), conv=conv))


class Codebook(nn.Module):
    """The codes of a vector quantiser."""

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


LAYERS = Layers(
    norm=lambda channels: nn.GroupNorm(GROUPS, channels, eps=EPSILON),
    conv=lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3, padding=1),
    point=lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1),
    down=lambda channels, _: downsample(channels),
    up=lambda channels, _: upsample(channels),
)


class Encoder(nn.Module):
    """Pixels to tokens."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.encoder = encoder_network(LAYERS, config, 3, (spatial_attention,) * config.middle_attention)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.quantize = Codebook(config.codes, config.code_width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels uint8 ``[T, H, W, 3]`` to tokens int32 ``[T, h, w]``."""
        images = scaled_images(pixels, self.quant_conv.weight)
        return self.quantize.encode(self.quant_conv(self.encoder(images)))


class Decoder(nn.Module):
    """Tokens to pixels."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.quantize = Codebook(config.codes, config.code_width)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)
        self.decoder = decoder_network(LAYERS, config, 3, (spatial_attention,) * config.middle_attention)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int32 ``[T, h, w]`` to pixels uint8 ``[T, H, W, 3]``."""
        images = self.decoder(self.post_quant_conv(self.quantize.decode(tokens)))
        return pixels_from_images((images.clamp(-1, 1) + 1) * 127.5)
