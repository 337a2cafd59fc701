"""The discrete video tokenizer of Cosmos (DV8x16x16).

Eight-fold smaller in time after a first frame of its own, sixteen-fold in space: a two-level Haar transform,
a causal convolutional network, finite scalar quantisation. Parameters carry the names of the released
TorchScript archives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diagd.export.tokenizers.base import TokenizerGraphs, VqganSizes

TEMPORAL_FACTOR = 8
HAAR_SIDE = 4
"""Pixels along each axis that one coefficient of the Haar transform covers."""

NETWORK = "diagd.export.tokenizers.cosmos_dv_network"
CHUNK_FRAMES = 33
PARAMETERS = 110_898_294
"""Of encoder and decoder with the default sizes."""


@dataclass(frozen=True)
class CosmosDvConfig(VqganSizes):
    """Sizes of the tokenizer; the defaults are the 720p release as the autoregressive models use it.

    The first level also halves the time. ``levels``: values that each quantised channel can take.
    """

    height: int = 640
    width: int = 1024
    channels: tuple[int, ...] = (256, 512, 512)
    latent_channels: int = 16
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)

    @property
    def finest(self) -> int:
        """Pixels of a coefficient of the Haar transform."""
        return HAAR_SIDE


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
        grid=config.grid,
        codes=math.prod(config.levels),
        temporal_factor=TEMPORAL_FACTOR,
        chunk_frames=CHUNK_FRAMES,
        network=NETWORK,
        config=config,
        parameters=PARAMETERS if config == CosmosDvConfig() else None,
        rename=rename,
        cover=True,
    )
