"""MineWorld's image tokenizer against a NumPy reference, its ONNX graphs, and the released sizes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from diagd.errors import UsageError
from diagd.export.families.mineworld import MineworldVqgan
from tests.export.tokenizers import oracle, support
from tests.export.tokenizers.oracle import Weights

CONFIG = MineworldVqgan(
    height=16,
    width=24,
    stem_channels=32,
    channels=(32, 32, 64),
    latent_channels=8,
    code_width=8,
    codes=96,
)


def released_name(name: str, levels: int) -> str:
    """The key of a parameter in vae.ckpt, without its leading ``model.``."""
    name = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    name = re.sub(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets.", name)
    name = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", name)
    up = re.compile(r"\.up\.(\d+)\.(block|upsample)\.")
    parts = {"block": "resnets", "upsample": "upsamplers.0"}
    name = up.sub(lambda m: f".up_blocks.{levels - 1 - int(m[1])}.{parts[m[2]]}.", name)
    return name.replace(".norm_out.", ".conv_norm_out.").replace(".nin_shortcut.", ".conv_shortcut.")


RELEASED = {released_name(name, 3): shape for name, shape in CONFIG.expected_shapes().items()}
TENSORS = oracle.random_tensors(RELEASED, seed=3)
PARAMETERS = {CONFIG.rename(f"model.{name}") or "": tensor for name, tensor in TENSORS.items()}
PIXELS = support.frames(3, 16, 24)
MINEWORLD = MineworldVqgan()


def reference_latents(frame: np.ndarray) -> np.ndarray:
    w = Weights(TENSORS, "encoder.")
    x = (frame.transpose(2, 0, 1) / 255 - 0.5) / 0.5
    x = oracle.same(x, w.at("conv_in"))
    for level in range(3):
        block = w.at("down_blocks", level)
        for n in range(2):
            x = oracle.resnet(x, block.at("resnets", n), "conv_shortcut")
        if level < 2:
            padded = np.pad(x, [(0, 0), (0, 1), (0, 1)])
            x = oracle.convolve(padded, block.at("downsamplers.0.conv"), (2, 2))
    for n in range(2):
        x = oracle.resnet(x, w.at("mid_block.resnets", n), "conv_shortcut")
    x = oracle.same(oracle.silu(oracle.group_norm(x, w.at("conv_norm_out"), 32)), w.at("conv_out"))
    return oracle.convolve(x, Weights(TENSORS, "quant_conv."))


def reference_pixels(tokens: np.ndarray) -> np.ndarray:
    w = Weights(TENSORS, "decoder.")
    x = Weights(TENSORS)["quantize.embedding.weight"][tokens].transpose(2, 0, 1)
    x = oracle.same(oracle.convolve(x, Weights(TENSORS, "post_quant_conv.")), w.at("conv_in"))
    for n in range(2):
        x = oracle.resnet(x, w.at("mid_block.resnets", n), "conv_shortcut")
    for level in range(3):
        block = w.at("up_blocks", level)
        for n in range(3):
            x = oracle.resnet(x, block.at("resnets", n), "conv_shortcut")
        if level < 2:
            x = oracle.same(oracle.repeat2(x), block.at("upsamplers.0.conv"))
    x = oracle.same(oracle.silu(oracle.group_norm(x, w.at("conv_norm_out"), 32)), w.at("conv_out"))
    return ((x.clip(-1, 1) + 1) / 2 * 255).astype(np.uint8).transpose(1, 2, 0)


def reference_tokens(frame: np.ndarray) -> np.ndarray:
    codebook = Weights(TENSORS)["quantize.embedding.weight"]
    return oracle.nearest(reference_latents(frame), codebook).astype(np.int32)


def test_modules_equal_the_reference() -> None:
    support.check_modules(CONFIG, PARAMETERS, PIXELS, reference_tokens, reference_pixels)


def test_graphs_equal_the_modules(tmp_path: Path) -> None:
    support.check_graphs(CONFIG, PARAMETERS, PIXELS, tmp_path, opsets=(18, 23))


def test_the_release_has_the_known_size() -> None:
    shapes = MINEWORLD.expected_shapes()
    assert len(shapes) == 277
    assert sum(map(math.prod, shapes.values())) == 146_244_675 == MINEWORLD.parameter_count()
    assert MINEWORLD.grid == (14, 24)


def test_keys_of_both_released_files() -> None:
    assert set(PARAMETERS) == set(CONFIG.expected_shapes())
    name = "decoder.up_blocks.0.upsamplers.0.conv.weight"
    assert name in RELEASED
    for prefix in ("model.", "tokenizer.model.", ""):
        assert CONFIG.rename(prefix + name) == "decoder.up.2.upsample.conv.weight"
    assert CONFIG.rename("model.encoder.mid_block.resnets.1.norm2.bias") == "encoder.mid.block_2.norm2.bias"
    assert CONFIG.rename("model.encoder.down_blocks.1.resnets.0.conv_shortcut.weight") == (
        "encoder.down.1.block.0.nin_shortcut.weight"
    )
    assert CONFIG.rename("transformer.model.norm.weight") is None
    first = MINEWORLD.rename("model.decoder.up_blocks.0.resnets.0.norm1.bias")
    assert first == "decoder.up.4.block.0.norm1.bias"


def test_a_frame_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(UsageError, match=r"225.*multiples of 16"):
        MineworldVqgan(height=225)
