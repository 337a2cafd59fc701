"""Half-precision modules stay close to single precision."""

from __future__ import annotations

import numpy as np
import pytest

from diagd.export.tokenizers.base import TokenizerGraphs
from tests.export.tokenizers import oracle, support
from tests.export.tokenizers.test_cosmos_dv import SHALLOW
from tests.export.tokenizers.test_vqgan import CONFIG as TAMING
from tests.export.tokenizers.test_vqgan_mineworld import CONFIG as MINEWORLD
from tests.export.tokenizers.test_wham_vit import CONFIG as WHAM


@pytest.mark.parametrize(
    "graphs",
    [
        SHALLOW,
        MINEWORLD,
        TAMING,
        WHAM,
    ],
    ids=["cosmos", "mineworld", "taming", "wham"],
)
def test_half_precision_is_close(graphs: TokenizerGraphs) -> None:
    tensors = oracle.random_tensors(graphs.expected_shapes(), seed=13)
    encoder, decoder = support.modules(graphs, tensors)
    pixels = support.frames(graphs.frames(3), graphs.height, graphs.width)
    tokens = support.run(encoder, pixels)
    decoded = support.run(decoder, tokens).astype(int)
    assert (support.run(encoder.half(), pixels) == tokens).mean() > 0.7
    assert np.abs(support.run(decoder.half(), tokens).astype(int) - decoded).mean() < 1
