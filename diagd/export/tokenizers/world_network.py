"""The networks of small worlds: the compact tokenizer, and a codebook of pixel patches without a network.

Patches are quantised as vectors (LBG; VQ-VAE section 3.1). A world drawn from tiles has few distinct ones,
and the codebook then holds them all: no loss.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from diagd.export.families.world import CompactGraphs, PatchGraphs
from diagd.export.tokenizers import vqgan_network as vqgan
from diagd.export.tokenizers.vqgan_network import LAYERS, ResnetBlock
from diagd.export.tracing import cast


class CompactEncoder(nn.Module):
    """Pixels to tokens."""

    def __init__(self, graphs: CompactGraphs) -> None:
        super().__init__()
        config = graphs.sizes
        self.levels, last = config.levels, config.channels[-1]
        halves = (nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise((3, *config.channels)))
        self.smaller = nn.ModuleList(halves)
        self.encoder_blocks = nn.ModuleList(ResnetBlock(LAYERS, last, last) for _ in range(config.res_blocks))
        self.norm_out = LAYERS.norm(last)
        self.conv_out = nn.Conv2d(last, len(config.levels), 1)

    def latents(self, images: Tensor) -> Tensor:
        """Map images ``[T, 3, H, W]`` in -1 .. 1 to latents ``[T, len(levels), h, w]``."""
        x = images
        for half in self.smaller:
            x = functional.silu(half(x))
        for block in self.encoder_blocks:
            x = block(x)
        latents: Tensor = self.conv_out(functional.silu(self.norm_out(x)))
        return latents

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels uint8 ``[T, H, W, 3]`` to tokens int32 ``[T, h, w]``."""
        latents = self.latents(vqgan.scaled_images(pixels, self.conv_out.weight))
        return vqgan.tokens_of_latents(latents, self.levels)


class CompactDecoder(nn.Module):
    """Tokens to pixels."""

    def __init__(self, graphs: CompactGraphs) -> None:
        super().__init__()
        config = graphs.sizes
        self.levels, widths = config.levels, config.channels[::-1]
        self.conv_in = nn.Conv2d(len(config.levels), widths[0], 3, padding=1)
        blocks = (*widths[:1] * config.res_blocks, *widths[1:])
        self.decoder_blocks = nn.ModuleList(ResnetBlock(LAYERS, width, width) for width in blocks)
        self.larger = nn.ModuleList(LAYERS.conv(a, 4 * b) for a, b in pairwise((*widths, 3)))

    def images(self, codes: Tensor) -> Tensor:
        """Map codes ``[T, len(levels), h, w]`` to images ``[T, 3, H, W]``, about -1 .. 1."""
        x = self.conv_in(codes)
        coarse = len(self.decoder_blocks) - len(self.larger) + 1
        for block in self.decoder_blocks[:coarse]:
            x = block(x)
        for double, block in zip(self.larger, [*self.decoder_blocks[coarse:], nn.Identity()], strict=True):
            x = block(functional.pixel_shuffle(double(functional.silu(x)), 2))
        images: Tensor = x
        return images

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int32 ``[T, h, w]`` to pixels uint8 ``[T, H, W, 3]``, rounded."""
        images = self.images(vqgan.codes_of_tokens(tokens, self.levels, self.conv_in.weight.dtype))
        return vqgan.pixels_from_images((images.clamp(-1, 1) + 1) * 127.5 + 0.5)


class _Patches(nn.Module):
    """Holds the codes, uint8 [codes, p, p, 3]."""

    codebook: Tensor

    def __init__(self, graphs: PatchGraphs) -> None:
        super().__init__()
        shape = graphs.codes, graphs.side, graphs.side, 3
        self.register_buffer("codebook", torch.zeros(shape, dtype=torch.uint8))


class PatchEncoder(_Patches):
    """Pixels to the ids of the nearest codes.

    Distances are exact: with 8-bit pixels and patches of up to 8 x 8 x 3 every term is an integer that
    float32 holds.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels uint8 [T, h*p, w*p, 3] to tokens int32 [T, h, w]; ties go to the lowest id."""
        side = self.codebook.shape[1]
        frames, height, width, _ = pixels.shape
        rows, columns = height // side, width // side
        patches = pixels.reshape(frames, rows, side, columns, side, 3).permute(0, 1, 3, 2, 4, 5)
        return vqgan.nearest_code(patches.reshape(frames, rows, columns, -1), self.codebook.flatten(1))


class PatchDecoder(_Patches):
    """Ids to pixels."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int32 [T, h, w] to pixels uint8 [T, h*p, w*p, 3]."""
        side = self.codebook.shape[1]
        frames, rows, columns = tokens.shape
        patches = self.codebook[cast(tokens, torch.int64)].permute(0, 1, 3, 2, 4, 5)
        return patches.reshape(frames, rows * side, columns * side, 3)
