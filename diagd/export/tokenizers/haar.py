"""Two levels of a three-dimensional Haar transform as one strided convolution and its inverse.

Each level takes sums and differences along time, height and width. The Cosmos tokenizers scale a level by
(1/sqrt 2)^3 and divide by 2 sqrt 2, which is 1/8 exactly, so the inverse has coefficients of +1 and -1.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from diagd.export.tokenizers.blocks import constant
from diagd.export.tokenizers.cosmos_dv import HAAR_SIDE

SIDE = HAAR_SIDE
COLOURS = 3
CHANNELS = COLOURS * SIDE**3


def basis() -> NDArray[np.float64]:
    """Signs ``[192, 3, 4, 4, 4]`` (band, colour, t, y, x).

    Bands are ordered by second level (t, y, x), first level (t, y, x), colour; low before high.
    """
    pair = np.array([[1.0, 1.0], [1.0, -1.0]])
    # second-level bands abc look at pairs ghi of first-level results, whose bands def look at pixels jkl
    signs: NDArray[np.float64] = np.einsum(
        "ag,bh,ci,dj,ek,fl,xy->abcdefxygjhkil", *[pair] * 6, np.eye(COLOURS)
    )
    return signs.reshape(CHANNELS, COLOURS, SIDE, SIDE, SIDE)


def analyse(video: Tensor) -> Tensor:
    """Bands ``[(T + 3) / 4, 192, H / 4, W / 4]`` of ``[T, 3, H, W]``, whose first frame counts four times."""
    padded = torch.cat([video[:1]] * (SIDE - 1) + [video])
    kernel = constant(basis() / SIDE**3, video)
    # a missing bias is exported as one that ONNX Runtime rejects unless constants are folded
    bias = constant(np.zeros(CHANNELS), video)
    bands = functional.conv3d(padded.transpose(0, 1).unsqueeze(0), kernel, bias, stride=SIDE)
    return bands.squeeze(0).transpose(0, 1)


def synthesise(bands: Tensor) -> Tensor:
    """The inverse: ``[t, 192, h, w]`` to ``[4t - 3, 3, 4h, 4w]``."""
    kernel = constant(basis(), bands)
    bias = constant(np.zeros(COLOURS), bands)
    video = functional.conv_transpose3d(bands.transpose(0, 1).unsqueeze(0), kernel, bias, stride=SIDE)
    return video.squeeze(0).transpose(0, 1)[SIDE - 1 :]
