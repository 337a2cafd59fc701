"""The compact tokenizer against a NumPy reference, and its graphs against the modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diagd.errors import UsageError
from diagd.export.families.world import LEVELS, CompactConfig, CompactGraphs
from diagd.export.tokenizers.vqgan_network import codes_of_tokens, tokens_of_latents
from tests.export.tokenizers import oracle, support
from tests.export.tokenizers.oracle import Weights

CONFIG = CompactConfig((8, 4), (32, 64), res_blocks=1)
GRAPHS = CompactGraphs(16, 24, CONFIG)
TENSORS = oracle.random_tensors(GRAPHS.expected_shapes(), seed=7)
PIXELS = support.frames(3, 16, 24)


def reference_tokens(frame: np.ndarray) -> np.ndarray:
    w = Weights(TENSORS)
    x = frame.transpose(2, 0, 1) / 127.5 - 1
    for n in range(2):
        x = oracle.silu(oracle.convolve(np.pad(x, [(0, 0), (1, 1), (1, 1)]), w.at("smaller", n), (2, 2)))
    x = oracle.resnet(x, w.at("encoder_blocks", 0), "nin_shortcut")
    x = oracle.silu(oracle.group_norm(x, w.at("norm_out"), 32))
    latents = torch.from_numpy(oracle.convolve(x, w.at("conv_out")))
    return tokens_of_latents(latents[None], CONFIG.levels)[0].numpy()


def reference_pixels(tokens: np.ndarray) -> np.ndarray:
    w = Weights(TENSORS)
    codes = codes_of_tokens(torch.from_numpy(tokens)[None], CONFIG.levels, torch.float64)[0].numpy()
    x = oracle.resnet(oracle.same(codes, w.at("conv_in")), w.at("decoder_blocks", 0), "nin_shortcut")
    for n in range(2):
        x = oracle.same(oracle.silu(x), w.at("larger", n))
        channels, rows, columns = x.shape
        shuffled = x.reshape(channels // 4, 2, 2, rows, columns).transpose(0, 3, 1, 4, 2)
        x = shuffled.reshape(channels // 4, 2 * rows, 2 * columns)
        if n == 0:
            x = oracle.resnet(x, w.at("decoder_blocks", 1), "nin_shortcut")
    return np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)


def test_modules_equal_the_reference() -> None:
    encoder, decoder = support.modules(GRAPHS, TENSORS)
    tokens = support.run(encoder, PIXELS)
    np.testing.assert_array_equal(tokens, np.stack([reference_tokens(frame) for frame in PIXELS]))
    assert len(np.unique(tokens)) > 8
    decoded = support.run(decoder, tokens)
    assert support.worst(decoded, np.stack([reference_pixels(frame) for frame in tokens])) <= 1
    assert decoded.std() > 10


def test_graphs_equal_the_modules(tmp_path: Path) -> None:
    encoder, decoder = support.modules(GRAPHS, TENSORS)
    tokens = support.run(encoder, PIXELS)
    to_tokens = support.session(encoder, PIXELS[:2], tmp_path / "encoder.onnx", opset=20)
    to_pixels = support.session(decoder, tokens[:2], tmp_path / "decoder.onnx", opset=20)
    for count in (1, 3):
        (found,) = to_tokens.run(None, {"pixels": PIXELS[:count]})
        assert support.worst(found, tokens[:count]) == 0
        (pixels,) = to_pixels.run(None, {"tokens": tokens[:count]})
        assert support.worst(pixels, support.run(decoder, tokens[:count])) <= 1


def test_the_shipped_sizes_fit_beside_a_transformer() -> None:
    """8 MB in float16 hold them and the 2.6 M parameters of the size 3m."""
    assert CompactGraphs(72, 96, CompactConfig.of_codes(512, 8)).parameter_count() < 1_300_000


@pytest.mark.parametrize("codes", LEVELS)
def test_numbers_of_codes_are_those_of_the_levels(codes: int) -> None:
    assert CompactConfig.of_codes(codes, 8).codes == codes
    assert CompactConfig.of_codes(codes, 8).factor == 8


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="known: 1000, 256, 512"):
        CompactConfig.of_codes(500, 8)
    with pytest.raises(UsageError, match="unknown patch '6'"):
        CompactConfig.of_codes(512, 6)
    with pytest.raises(UsageError, match="must be multiples of 4"):
        CompactGraphs(16, 26, CONFIG)
