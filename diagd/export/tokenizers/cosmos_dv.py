"""The discrete video tokenizer of Cosmos (DV8x16x16).

Eight-fold smaller in time after a first frame of its own, sixteen-fold in space: a two-level Haar transform,
a causal convolutional network, finite scalar quantisation. Parameters carry the names of the released
TorchScript archives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from diagd.errors import UsageError
from diagd.export.tokenizers import fsq, haar
from diagd.export.tokenizers.base import TokenizerGraphs
from diagd.export.tokenizers.causal import (
    Downsample,
    FrameConv,
    FrameNorm,
    Middle,
    ResnetBlock,
    Upsample,
    factorised,
)
from diagd.export.tokenizers.pixels import images_from_pixels, pixels_from_images
from diagd.export.tokenizers.shapes import Shapes, count, shape_of

TEMPORAL_FACTOR = 8
CHUNK_FRAMES = 33


@dataclass(frozen=True)
class CosmosDvConfig:
    """Sizes of the tokenizer; the defaults are the 720p release as the autoregressive models use it.

    Attributes:
        height: pixel rows.
        width: pixel columns.
        stem_channels: channels of the first convolution.
        channels: channels of each resolution level, finest first; every level but the last halves the size,
            and the first also halves the time.
        res_blocks: residual blocks of an encoder level; a decoder level has one more.
        latent_channels: channels between the network and the quantiser's 1x1x1 convolution.
        levels: values that each quantised channel can take.
    """

    height: int = 640
    width: int = 1024
    stem_channels: int = 128
    channels: tuple[int, ...] = (256, 512, 512)
    res_blocks: int = 2
    latent_channels: int = 16
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)

    def __post_init__(self) -> None:
        if self.height % self.factor or self.width % self.factor:
            raise UsageError(
                f"frame height {self.height}, width {self.width}; both must be multiples of {self.factor}"
            )

    @property
    def factor(self) -> int:
        """Pixels per token along each spatial axis."""
        return haar.SIDE << (len(self.channels) - 1)


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


def rename(name: str) -> str | None:
    """Parameter name of a key of encoder.jit, decoder.jit or autoencoder.jit; derived buffers give None."""
    weights = name.endswith((".weight", ".bias"))
    known = name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    return name if weights and known else None


def graphs(config: CosmosDvConfig) -> TokenizerGraphs:
    """Encoder and decoder of ``config`` for the exporter."""
    return TokenizerGraphs(
        height=config.height,
        width=config.width,
        grid=(config.height // config.factor, config.width // config.factor),
        codes=math.prod(config.levels),
        temporal_factor=TEMPORAL_FACTOR,
        chunk_frames=CHUNK_FRAMES,
        build_encoder=lambda: Encoder(config),
        build_decoder=lambda: Decoder(config),
        rename=rename,
        cover=True,
    )


def expected_shapes(config: CosmosDvConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of encoder and decoder, by released name."""
    return graphs(config).expected_shapes()


def infer_config(shapes: Shapes, height: int = 640, width: int = 1024) -> CosmosDvConfig:
    """Sizes of a checkpoint; frame size and quantiser levels are not stored in one.

    Args:
        shapes: tensor shapes of the encoder by parameter name.
        height: pixel rows.
        width: pixel columns.

    Raises:
        CheckpointError: a tensor that the sizes are read from is missing.
    """
    levels = range(count(shapes, "encoder.down"))
    return CosmosDvConfig(
        height=height,
        width=width,
        stem_channels=shape_of(shapes, "encoder.conv_in.0.conv3d.weight", 5)[0],
        channels=tuple(
            shape_of(shapes, f"encoder.down.{n}.block.0.conv1.0.conv3d.weight", 5)[0] for n in levels
        ),
        res_blocks=count(shapes, "encoder.down.0.block"),
        latent_channels=shape_of(shapes, "quant_conv.conv3d.weight", 5)[1],
    )
