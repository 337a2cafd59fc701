"""The graphs of the patch tokenizer, for the exporter."""

from __future__ import annotations

import math
from functools import partial

from diagd.export.tokenizers.base import TokenizerGraphs, build, grid_of

NETWORK = "diagd.export.tokenizers.patch"
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
        temporal_factor=1,
        chunk_frames=CHUNK_FRAMES,
        build_encoder=partial(build, NETWORK, "PatchEncoder.empty", shape),
        build_decoder=partial(build, NETWORK, "PatchDecoder.empty", shape),
        parameters=math.prod(shape),
        rename=lambda name: name,
    )
