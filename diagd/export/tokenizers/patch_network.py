"""Pixel patches as tokens: vector quantisation (LBG; VQ-VAE section 3.1) without a network.

A world drawn from tiles has few distinct patches, and the codebook then holds them all: no loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diagd.export.tokenizers.base import PatchGraphs
from diagd.export.tokenizers.vqgan_network import nearest_code
from diagd.export.tracing import cast


class _Patches(nn.Module):
    """Holds the codes, uint8 [codes, p, p, 3]."""

    codebook: Tensor

    def __init__(self, graphs: PatchGraphs) -> None:
        super().__init__()
        shape = graphs.codes, graphs.side, graphs.side, 3
        self.register_buffer("codebook", torch.zeros(shape, dtype=torch.uint8))


class Encoder(_Patches):
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
        return nearest_code(patches.reshape(frames, rows, columns, -1), self.codebook.flatten(1))


class Decoder(_Patches):
    """Ids to pixels."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int32 [T, h, w] to pixels uint8 [T, h*p, w*p, 3]."""
        side = self.codebook.shape[1]
        frames, rows, columns = tokens.shape
        patches = self.codebook[cast(tokens, torch.int64)].permute(0, 1, 3, 2, 4, 5)
        return patches.reshape(frames, rows * side, columns * side, 3)
