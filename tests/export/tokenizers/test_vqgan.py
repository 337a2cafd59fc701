"""The taming VQGAN against a NumPy reference, its ONNX graphs, and checkpoint sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diagd.errors import CheckpointError, UsageError
from diagd.export.tokenizers.base import VqganConfig, infer_vqgan
from tests.export.tokenizers import oracle, support
from tests.export.tokenizers.oracle import Weights

CONFIG = VqganConfig(
    height=16,
    width=16,
    stem_channels=32,
    channels=(32, 64, 64),
    res_blocks=1,
    attention_levels=(1,),
    latent_channels=12,
    code_width=8,
    codes=80,
)
TENSORS = oracle.random_tensors(CONFIG.expected_shapes(), seed=11)
PIXELS = support.frames(3, 16, 16)


def middle(x: oracle.Array, w: Weights) -> oracle.Array:
    x = oracle.resnet(x, w.at("block_1"), "nin_shortcut")
    return oracle.resnet(oracle.attention(x, w.at("attn_1")), w.at("block_2"), "nin_shortcut")


def blocks(x: oracle.Array, level: Weights, count: int, *, attention: bool) -> oracle.Array:
    for n in range(count):
        x = oracle.resnet(x, level.at("block", n), "nin_shortcut")
        if attention:
            x = oracle.attention(x, level.at("attn", n))
    return x


def reference_tokens(frame: np.ndarray) -> np.ndarray:
    w = Weights(TENSORS, "encoder.")
    x = oracle.same(frame.transpose(2, 0, 1) / 127.5 - 1, w.at("conv_in"))
    for n in range(3):
        level = w.at("down", n)
        x = blocks(x, level, 1, attention=n == 1)
        if n < 2:
            x = oracle.convolve(np.pad(x, [(0, 0), (0, 1), (0, 1)]), level.at("downsample.conv"), (2, 2))
    x = oracle.silu(oracle.group_norm(middle(x, w.at("mid")), w.at("norm_out"), 32))
    x = oracle.convolve(oracle.same(x, w.at("conv_out")), Weights(TENSORS, "quant_conv."))
    return oracle.nearest(x, Weights(TENSORS)["quantize.embedding.weight"]).astype(np.int32)


def reference_pixels(tokens: np.ndarray) -> np.ndarray:
    w = Weights(TENSORS, "decoder.")
    x = Weights(TENSORS)["quantize.embedding.weight"][tokens].transpose(2, 0, 1)
    x = oracle.same(oracle.convolve(x, Weights(TENSORS, "post_quant_conv.")), w.at("conv_in"))
    x = middle(x, w.at("mid"))
    for n in (2, 1, 0):
        level = w.at("up", n)
        x = blocks(x, level, 2, attention=n == 1)
        if n > 0:
            x = oracle.same(oracle.repeat2(x), level.at("upsample.conv"))
    x = oracle.same(oracle.silu(oracle.group_norm(x, w.at("norm_out"), 32)), w.at("conv_out"))
    return ((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)


def test_modules_equal_the_reference() -> None:
    support.check_modules(CONFIG, TENSORS, PIXELS, reference_tokens, reference_pixels)


def test_graphs_equal_the_modules(tmp_path: Path) -> None:
    support.check_graphs(CONFIG, TENSORS, PIXELS, tmp_path, opsets=(23, 18))


def test_sizes_are_read_off_a_checkpoint() -> None:
    assert infer_vqgan(CONFIG.expected_shapes(), 16) == CONFIG
    assert infer_vqgan(VqganConfig().expected_shapes()) == VqganConfig()
    with pytest.raises(CheckpointError, match=r"quantize\.embedding\.weight"):
        infer_vqgan({})


def test_the_published_model_has_its_published_names() -> None:
    shapes = VqganConfig().expected_shapes()
    assert shapes["encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert shapes["decoder.up.4.upsample.conv.weight"] == (512, 512, 3, 3)
    assert "decoder.up.3.attn.2.proj_out.weight" in shapes
    assert VqganConfig().grid == (8, 8)


def test_keys_below_the_prefix_are_kept() -> None:
    prefix = "context_encoders.images.vq_model."
    rename = CONFIG.rename
    assert all(rename(prefix + name) == name for name in CONFIG.expected_shapes())
    assert rename(prefix + "colorize") is None
    assert rename("encoder.conv_in.weight") is None


def test_a_frame_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(UsageError, match=r"120.*multiples of 16"):
        VqganConfig(height=120)
