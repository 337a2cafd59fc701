"""The graphs of the patch tokenizer, for the exporter."""

from __future__ import annotations

import math

from diagd.export.tokenizers.base import TokenizerGraphs, grid_of

NETWORK = "diagd.export.tokenizers.patch_network"
CHUNK_FRAMES = 64


def graphs(height: int, width: int, codes: int, side: int) -> TokenizerGraphs:
    """Encoder and decoder for ``height`` x ``width`` pixels, cut into patches of ``side`` x ``side``.

    Raises:
        UsageError: they cannot be.
    """
    shape = (codes, side, side, 3)
    return TokenizerGraphs(
        height=height,
        width=width,
        grid=grid_of(height, width, side),
        codes=codes,
        chunk_frames=CHUNK_FRAMES,
        network=NETWORK,
        config=shape,
        parameters=math.prod(shape),
    )
