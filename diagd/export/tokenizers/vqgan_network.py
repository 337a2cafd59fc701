"""The network of taming-transformers' VQGAN, and what all tokenizers share of it: quantisation, pixels.

Those of MineWorld, WHAM and Cosmos are that network (Esser et al. 2021), built of different `Layers`.
Submodules carry taming's names; everything is ``[T, C, H, W]``, frames first.

Finite scalar quantisation (Mentzer et al. 2023, section 3) rounds each channel to a few levels: a token is a
mixed-radix number whose first digit is the first channel. All arithmetic is float32, exact on such integers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from diagd.export.tokenizers.base import VqganConfig, VqganSizes
from diagd.export.tracing import cast

# keeps the outermost levels reachable at finite latents
STRETCH = 1 + 1e-3
GROUPS = 32
EPSILON = 1e-6

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def tokens_of_latents(latents: Tensor, levels: Sequence[int]) -> Tensor:
    """Quantise latents ``[T, len(levels), h, w]`` to tokens int32 ``[T, h, w]``; halves round to even."""
    bounded = _bounded(cast(latents, torch.float32), levels)
    digits = bounded.round() + _channels([level // 2 for level in levels], bounded)
    return cast((digits * _channels(_place_values(levels), bounded)).sum(1), torch.int32)


def codes_of_latents(latents: Tensor, levels: Sequence[int]) -> Tensor:
    """The codes of `tokens_of_latents`, float32, with the gradient of the latents they were rounded from."""
    bounded = _bounded(cast(latents, torch.float32), levels)
    rounded = bounded + (bounded.round() - bounded).detach()
    return rounded / _channels([level // 2 for level in levels], bounded)


def codes_of_tokens(tokens: Tensor, levels: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Quantised latents ``[T, len(levels), h, w]`` in [-1, 1] of tokens int32 ``[T, h, w]``."""
    z = cast(tokens.unsqueeze(1), torch.float32)
    radix, middle = _channels(levels, z), _channels([level // 2 for level in levels], z)
    quotient = (z / _channels(_place_values(levels), z)).floor()
    digits = quotient - (quotient / radix).floor() * radix
    return cast((digits - middle) / middle, dtype)


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


class Layers(NamedTuple):
    """Layers that a network is built of.

    Attributes:
        norm: of a number of channels.
        conv: three cells wide along every axis, from channels to channels.
        point: one cell wide, from channels to channels.
        down, up: change of resolution between two levels, of (channels, finer level of the two).
    """

    norm: Callable[[int], nn.Module]
    conv: Callable[[int, int], nn.Module]
    point: Callable[[int, int], nn.Module]
    down: Callable[[int, int], nn.Module]
    up: Callable[[int, int], nn.Module]


class ResnetBlock(nn.Module):
    """norm, SiLU, convolution, twice, plus the input."""

    def __init__(self, layers: Layers, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm1 = layers.norm(in_channels)
        self.conv1 = layers.conv(in_channels, channels)
        self.norm2 = layers.norm(channels)
        self.conv2 = layers.conv(channels, channels)
        self.nin_shortcut = nn.Identity() if in_channels == channels else layers.point(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, in_channels, H, W]`` to ``[T, channels, H, W]``."""
        hidden: Tensor = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        same: Tensor = self.nin_shortcut(x)
        return same + hidden


class Attention(nn.Module):
    """Single-head attention, added to its input; ``attend`` mixes values by queries and keys."""

    def __init__(self, layers: Layers, channels: int, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.norm = layers.norm(channels)
        self.q = layers.point(channels, channels)
        self.k = layers.point(channels, channels)
        self.v = layers.point(channels, channels)
        self.proj_out = layers.point(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, C, H, W]`` to itself."""
        normed = self.norm(x)
        mixed: Tensor = self.proj_out(self.attend(self.q(normed), self.k(normed), self.v(normed)))
        return x + mixed


def middle(layers: Layers, channels: int, attends: Sequence[Attend]) -> nn.Module:
    """The coarsest level: block, attentions, block."""
    attentions = [Attention(layers, channels, attend) for attend in attends]
    return nn.Sequential(
        OrderedDict(
            block_1=ResnetBlock(layers, channels, channels),
            attn_1=attentions[0] if len(attentions) == 1 else nn.Sequential(*attentions),
            block_2=ResnetBlock(layers, channels, channels),
        )
    )


class Level(nn.Module):
    """Blocks of one resolution, each perhaps followed by attention, and the way to the next resolution."""

    def __init__(
        self, layers: Layers, widths: Sequence[int], *, attention: bool, **resample: nn.Module
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(layers, a, b) for a, b in pairwise(widths))
        attentions = [Attention(layers, width, spatial_attention) for width in widths[1:] if attention]
        self.attn = nn.ModuleList(attentions)
        self.behind = tuple(resample)
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, C, H, W]`` to ``[T', C', H', W']``."""
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        for name in self.behind:
            x = self.get_submodule(name)(x)
        return x


def encoder_network(layers: Layers, sizes: VqganSizes, inputs: int, attends: Sequence[Attend]) -> nn.Module:
    """From images ``[T, inputs, H, W]`` to latents ``[T', latent, h, w]``, through finer levels first.

    ``attends``: how cells of the coarsest level attend.
    """
    levels, last = sizes.channels, len(sizes.channels) - 1
    before = (sizes.stem_channels, *levels)
    down = (
        Level(
            layers,
            [before[level]] + [width] * sizes.res_blocks,
            attention=level in sizes.attention_levels,
            **({"downsample": layers.down(width, level)} if level < last else {}),
        )
        for level, width in enumerate(levels)
    )
    return nn.Sequential(
        OrderedDict(
            conv_in=layers.conv(inputs, sizes.stem_channels),
            down=nn.Sequential(*down),
            mid=middle(layers, levels[-1], attends),
            norm_out=layers.norm(levels[-1]),
            silu=nn.SiLU(),
            conv_out=layers.conv(levels[-1], sizes.latent_channels),
        )
    )


def decoder_network(layers: Layers, sizes: VqganSizes, outputs: int, attends: Sequence[Attend]) -> nn.Module:
    """From latents ``[T', latent, h, w]`` to images ``[T, outputs, H, W]``, through coarser levels first."""
    levels = sizes.channels
    before = (*levels[1:], levels[-1])
    up = {
        str(level): Level(
            layers,
            [before[level]] + [width] * (sizes.res_blocks + 1),
            attention=level in sizes.attention_levels,
            **({"upsample": layers.up(width, level - 1)} if level > 0 else {}),
        )
        for level, width in reversed([*enumerate(levels)])
    }
    return nn.Sequential(
        OrderedDict(
            conv_in=layers.conv(sizes.latent_channels, levels[-1]),
            mid=middle(layers, levels[-1], attends),
            up=nn.Sequential(OrderedDict(up)),
            norm_out=layers.norm(levels[0]),
            silu=nn.SiLU(),
            conv_out=layers.conv(levels[0], outputs),
        )
    )


def spatial_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Single-head attention among the cells of each image; all tensors ``[T, C, H, W]``, scale C^-0.5."""
    q, k, v = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (query, key, value))
    attended = functional.scaled_dot_product_attention(q, k, v)
    return attended.squeeze(1).transpose(1, 2).reshape(value.shape)


def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index int32 ``[...]`` of the row of ``[codes, D]`` nearest to each of ``[..., D]``; ties to the first.

    By Euclidean distance, in float32.
    """
    rows = cast(codebook, torch.float32)
    # |z|^2 is the same for every code and would only cost precision
    distances = (rows * rows).sum(1) - 2 * cast(latents, torch.float32) @ rows.transpose(0, 1)
    return cast(distances.argmin(-1), torch.int32)


def images_from_pixels(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames uint8 ``[T, H, W, 3]`` as images ``[T, 3, H, W]`` with values 0 .. 255."""
    return cast(pixels.permute(0, 3, 1, 2), dtype)


def scaled_images(pixels: Tensor, like: Tensor) -> Tensor:
    """Frames uint8 ``[T, H, W, 3]`` as images ``[T, 3, H, W]`` in -1 .. 1, of the dtype of ``like``."""
    return images_from_pixels(pixels, like.dtype) / 127.5 - 1


def pixels_from_images(images: Tensor) -> Tensor:
    """Images ``[T, 3, H, W]`` with values 0 .. 255, truncated to frames uint8 ``[T, H, W, 3]``."""
    return cast(images.permute(0, 2, 3, 1), torch.uint8)


def constant(values: Sequence[float] | NDArray[np.float64], like: Tensor) -> Tensor:
    """A literal of the graph with the dtype and device of ``like``.

    Made from host memory at the time of the call, so that a module built or traced on the meta device still
    exports its values.
    """
    literal = torch.tensor(np.asarray(values).tolist(), dtype=like.dtype, device="cpu")
    placed: Tensor = torch.ops.aten._to_copy.default(literal, device=like.device)
    return placed


def downsample(channels: int) -> nn.Module:
    """Half the size by a strided 3x3 convolution, padded on the right and at the bottom only."""
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def upsample(channels: int) -> nn.Module:
    """Twice the size by repetition, then a 3x3 convolution."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(larger=nn.Upsample(scale_factor=2.0), conv=conv))


def empty_embedding(codes: int, width: int) -> nn.Embedding:
    """One to be loaded: random numbers, even of no data, take a second, as they load PyTorch's compiler."""
    made: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(codes, width), freeze=False)
    return made


class Codebook(nn.Module):
    """The codes of a vector quantiser."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = empty_embedding(codes, width)

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
