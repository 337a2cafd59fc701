"""A small convolutional tokenizer with finite scalar quantisation: what ``diagd world train`` trains.

Every frame by itself. Each resolution halves the picture at once, so that hardly any work is done on pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diagd.errors import unknown
from diagd.export.tokenizers.base import TokenizerGraphs, grid_of

NETWORK = "diagd.export.tokenizers.compact_network"
CHUNK_FRAMES = 64

LEVELS = {256: (8, 8, 4), 512: (8, 8, 8), 1000: (8, 5, 5, 5)}
"""Values that each quantised channel takes, by the number of ids (Mentzer et al. 2023, section 4.1)."""

CHANNELS = {4: (32, 64), 8: (32, 64, 96), 16: (32, 64, 96, 128)}
"""By the pixels along a side of a cell."""


@dataclass(frozen=True)
class CompactConfig:
    """Sizes of the tokenizer.

    Attributes:
        levels: values that each quantised channel can take.
        channels: of each resolution, finest first; the first is half the picture's.
        res_blocks: residual blocks of the coarsest resolution; in the decoder the others have one each.
    """

    levels: tuple[int, ...]
    channels: tuple[int, ...]
    res_blocks: int = 2

    @classmethod
    def of_codes(cls, codes: int, patch: int) -> CompactConfig:
        """The tokenizer of so many ids, each for ``patch`` x ``patch`` pixels.

        Raises:
            UsageError: no levels are known for that many ids, or no channels for such patches.
        """
        if codes not in LEVELS:
            raise unknown("number of codes", str(codes), [str(known) for known in LEVELS])
        if patch not in CHANNELS:
            raise unknown("patch", str(patch), [str(known) for known in CHANNELS])
        return cls(LEVELS[codes], CHANNELS[patch])

    @property
    def factor(self) -> int:
        """Pixels per token along each axis."""
        return 1 << len(self.channels)

    @property
    def codes(self) -> int:
        """Number of ids."""
        return math.prod(self.levels)


def graphs(config: CompactConfig, height: int, width: int) -> TokenizerGraphs:
    """Encoder and decoder for frames of ``height`` x ``width`` pixels.

    Raises:
        UsageError: these are no multiples of the pixels of a token.
    """
    return TokenizerGraphs(
        height=height,
        width=width,
        grid=grid_of(height, width, config.factor),
        codes=config.codes,
        chunk_frames=CHUNK_FRAMES,
        network=NETWORK,
        config=config,
    )
