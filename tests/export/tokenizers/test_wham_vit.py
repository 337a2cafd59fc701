"""WHAM's ViT-VQGAN against a NumPy reference, its ONNX graphs, padding, and checkpoint sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diagd.errors import CheckpointError, UsageError
from diagd.export.families.wham import WhamVitConfig, infer_config
from tests.export.tokenizers import oracle, support
from tests.export.tokenizers.oracle import Array, Weights

CONFIG = WhamVitConfig(height=17, width=22, patch=5, hidden=24, layers=2, head_size=8, code_width=6, codes=50)
TENSORS = oracle.random_tensors(CONFIG.expected_shapes(), seed=7)
PIXELS = support.frames(3, 17, 22)
ROWS, COLUMNS = 4, 5
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def layer_norm(x: Array, w: Weights) -> Array:
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    made: Array = normed * w["weight"] + w.get("bias", 0)
    return made


def linear(x: Array, w: Weights) -> Array:
    return x @ w["weight"].T + w.get("bias", 0)


def gelu(x: Array) -> Array:
    made: Array = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return made


def transformer(x: Array, w: Weights) -> Array:
    x = linear(x, w.at("proj1")) + w["pos_embeds.weight"]
    for layer in range(CONFIG.layers):
        block = w.at("vit", layer)
        q, k, v = np.split(linear(layer_norm(x, block.at("ln_1")), block.at("attn.c_attn")), 3, axis=-1)
        mixed = np.empty_like(x)
        for head in range(0, CONFIG.hidden, CONFIG.head_size):
            part = slice(head, head + CONFIG.head_size)
            scores = q[:, part] @ k[:, part].T / np.sqrt(CONFIG.head_size)
            mixed[:, part] = oracle.softmax(scores) @ v[:, part]
        x = x + linear(mixed, block.at("attn.c_proj"))
        hidden = gelu(linear(layer_norm(x, block.at("ln_2")), block.at("mlp.c_fc")))
        x = x + linear(hidden, block.at("mlp.c_proj"))
    return linear(layer_norm(x, w.at("output_ln")), w.at("output_proj"))


def unit(x: Array) -> Array:
    made: Array = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return made


def reference_tokens(frame: np.ndarray) -> np.ndarray:
    image = np.zeros((ROWS * 5, COLUMNS * 5, 3))
    image[:17, :22] = (frame / 255 - MEAN) / DEVIATION
    patches = [
        image[5 * i : 5 * i + 5, 5 * j : 5 * j + 5].transpose(2, 0, 1).ravel()
        for i in range(ROWS)
        for j in range(COLUMNS)
    ]
    latents = unit(transformer(np.stack(patches), Weights(TENSORS, "encoder.")))
    cosines = latents @ unit(Weights(TENSORS)["vq_vae._embedding.weight"]).T
    made: np.ndarray = cosines.argmax(-1).reshape(ROWS, COLUMNS).astype(np.int32)
    return made


def reference_pixels(tokens: np.ndarray) -> np.ndarray:
    codes = unit(Weights(TENSORS)["vq_vae._embedding.weight"])[tokens.ravel()]
    patches = transformer(codes, Weights(TENSORS, "decoder.")).reshape(ROWS, COLUMNS, 3, 5, 5)
    image = np.block([[[patches[i, j, c] for j in range(COLUMNS)] for i in range(ROWS)] for c in range(3)])
    image = image.reshape(3, ROWS * 5, COLUMNS * 5).transpose(1, 2, 0)[:17, :22]
    made: np.ndarray = ((image * DEVIATION + MEAN).clip(0, 1) * 255).astype(np.uint8)
    return made


def test_modules_equal_the_reference_on_a_padded_size() -> None:
    support.check_modules(CONFIG, TENSORS, PIXELS, reference_tokens, reference_pixels)


def test_graphs_equal_the_modules(tmp_path: Path) -> None:
    support.check_graphs(CONFIG, TENSORS, PIXELS, tmp_path, opsets=(18, 23))


def test_the_release_has_the_known_grid() -> None:
    assert WhamVitConfig().grid == (18, 30)
    assert WhamVitConfig().expected_shapes()["encoder.pos_embeds.weight"][0] == 540


def test_sizes_are_read_off_a_checkpoint() -> None:
    shapes = CONFIG.expected_shapes()
    assert infer_config(shapes, 17, 22, head_size=8) == CONFIG
    assert infer_config(WhamVitConfig().expected_shapes()) == WhamVitConfig()
    with pytest.raises(CheckpointError, match=r"20 positions.*height 180 and width 300 give 2160 patches"):
        infer_config(shapes, head_size=8)
    with pytest.raises(UsageError, match=r"head size 7 does not divide.*24"):
        infer_config(shapes, 17, 22, head_size=7)
    with pytest.raises(CheckpointError, match=r"encoder\.proj1\.weight.*expected 2 dimensions"):
        infer_config({"encoder.proj1.weight": (3,)})


def test_only_inference_tensors_are_kept() -> None:
    prefix = "context_encoders.images."
    assert all(CONFIG.rename(prefix + name) == name for name in CONFIG.expected_shapes())
    for name in ("encoder.vit.0.attn.attn_mask", "patch_gan.last.weight", "target_patchgan.last.weight"):
        assert CONFIG.rename(prefix + name) is None
    assert CONFIG.rename("predictor.gpt_model.lm_head.weight") is None


def test_whole_patches_need_no_padding() -> None:
    assert replace(CONFIG, height=20, width=25).grid == CONFIG.grid
    assert replace(CONFIG, height=21).grid == (5, 5)
