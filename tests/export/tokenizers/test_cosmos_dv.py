"""Cosmos' video tokenizer against a NumPy reference, its ONNX graphs, causality, and the released sizes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from diagd.errors import UsageError
from diagd.export.families.cosmos import (
    CosmosDvConfig,
)
from tests.export.tokenizers import oracle, support
from tests.export.tokenizers.oracle import Array, Weights
from tests.export.tokenizers.test_cosmos_dv_network import level as haar_level

CONFIG = CosmosDvConfig(
    height=32, width=48, stem_channels=8, channels=(8, 12, 12), res_blocks=1, latent_channels=4
)
TENSORS = oracle.random_tensors(CONFIG.expected_shapes(), seed=5)
PIXELS = support.frames(17, 32, 48)
SHALLOW = CosmosDvConfig(
    height=16, width=24, stem_channels=4, channels=(4, 8), res_blocks=1, latent_channels=4
)


def conv(x: Array, w: Weights, stride: tuple[int, ...] = (1, 1, 1)) -> Array:
    return oracle.convolve(x, w.at("conv3d"), stride)


def factorised(x: Array, w: Weights) -> Array:
    """[C, T, H, W]: 3 x 3 with zeros around, then three frames with the first one repeated in front."""
    return timed(conv(np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]), w.at(0)), w.at(1), past=2)


def timed(x: Array, w: Weights, past: int, stride: int = 1) -> Array:
    return conv(np.concatenate([x[:, :1]] * past + [x], axis=1), w, (stride, 1, 1))


def norm(x: Array, w: Weights) -> Array:
    return np.stack([oracle.group_norm(frame, w.at("norm"), 1) for frame in x.swapaxes(0, 1)], axis=1)


def resnet(x: Array, w: Weights) -> Array:
    hidden = factorised(oracle.silu(norm(x, w.at("norm1"))), w.at("conv1"))
    hidden = factorised(oracle.silu(norm(hidden, w.at("norm2"))), w.at("conv2"))
    return hidden + (conv(x, w.at("nin_shortcut")) if "nin_shortcut.conv3d.weight" in w else x)


def middle(x: Array, w: Weights) -> Array:
    x = resnet(x, w.at("block_1"))
    for attend, index in ((spatial, 0), (temporal, 1)):
        head = w.at("attn_1", index)
        normed = norm(x, head.at("norm"))
        x = x + conv(attend(*(conv(normed, head.at(name)) for name in "qkv")), head.at("proj_out"))
    return resnet(x, w.at("block_2"))


def spatial(q: Array, k: Array, v: Array) -> Array:
    out = np.empty_like(v)
    for t in range(q.shape[1]):
        rows, keys, values = (x[:, t].reshape(len(x), -1) for x in (q, k, v))
        out[:, t] = (values @ oracle.softmax(rows.T @ keys / np.sqrt(len(q))).T).reshape(v[:, t].shape)
    return out


def temporal(q: Array, k: Array, v: Array) -> Array:
    out = np.empty_like(v)
    for t in range(q.shape[1]):
        scores = np.einsum("cyx,csyx->yxs", q[:, t], k[:, : t + 1]) / np.sqrt(len(q))
        out[:, t] = np.einsum("yxs,csyx->cyx", oracle.softmax(scores), v[:, : t + 1])
    return out


def down(x: Array, w: Weights, *, time: bool) -> Array:
    c, t, height, width = x.shape
    mean = x.reshape(c, t, height // 2, 2, width // 2, 2).mean((3, 5))
    x = mean + conv(np.pad(x, [(0, 0), (0, 0), (0, 1), (0, 1)]), w.at("conv1"), (1, 2, 2))
    if time:
        x = np.concatenate([x[:, :1], x], axis=1)
        x = timed(x, w.at("conv2"), past=1, stride=2) + (x[:, 0::2] + x[:, 1::2]) / 2
    return conv(x, w.at("conv3"))


def up(x: Array, w: Weights, *, time: bool) -> Array:
    if time:
        x = x.repeat(2, axis=1)[:, 1:]
        x = timed(x, w.at("conv1"), past=2) + x
    x = x.repeat(2, axis=2).repeat(2, axis=3)
    x = conv(np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]), w.at("conv2")) + x
    return conv(x, w.at("conv3"))


def reference_tokens(pixels: np.ndarray) -> np.ndarray:
    w = Weights(TENSORS, "encoder.")
    video = pixels.transpose(3, 0, 1, 2) / 127.5 - 1
    x = haar_level(haar_level(np.concatenate([video[:, :1]] * 3 + [video], axis=1)))
    x = factorised(x, w.at("conv_in"))
    for n in range(3):
        x = resnet(x, w.at("down", n, "block", 0))
        if n < 2:
            x = down(x, w.at("down", n, "downsample"), time=n == 0)
    x = oracle.silu(norm(middle(x, w.at("mid")), w.at("norm_out")))
    x = conv(factorised(x, w.at("conv_out")), Weights(TENSORS, "quant_conv."))
    total = np.zeros(x.shape[1:], dtype=np.int32)
    for z, levels, place in zip(x, CONFIG.levels, (1, 8, 64, 512, 2560, 12800), strict=True):
        half, offset = (levels - 1) * 1.001 / 2, 0.0 if levels % 2 else 0.5
        bounded = np.tanh(z + np.arctanh(offset / half)) * half - offset
        total += place * (np.round(bounded).astype(np.int32) + levels // 2)
    return total


def unhaar(bands: Array) -> Array:
    """Invert one published level on [8 C, T, H, W]."""
    parts = list(np.split(bands * 2 * np.sqrt(2), 8))
    for axis in (3, 2, 1):
        merged = []
        for low, high in zip(parts[0::2], parts[1::2], strict=True):
            pair = np.stack([low + high, low - high], axis=axis + 1) / np.sqrt(2)
            shape = list(low.shape)
            shape[axis] *= 2
            merged.append(pair.reshape(shape))
        parts = merged
    return parts[0]


def reference_pixels(tokens: np.ndarray) -> np.ndarray:
    w = Weights(TENSORS, "decoder.")
    digits = np.stack(np.unravel_index(tokens, CONFIG.levels, order="F"))
    middles = np.array([4, 4, 4, 2, 2, 2]).reshape(6, 1, 1, 1)
    x = conv((digits - middles) / middles, Weights(TENSORS, "post_quant_conv."))
    x = middle(factorised(x, w.at("conv_in")), w.at("mid"))
    for n in (2, 1, 0):
        for block in range(2):
            x = resnet(x, w.at("up", n, "block", block))
        if n > 0:
            x = up(x, w.at("up", n, "upsample"), time=n == 1)
    x = factorised(oracle.silu(norm(x, w.at("norm_out"))), w.at("conv_out"))
    video = unhaar(unhaar(x))[:, 3:]
    return ((video * 0.5 + 0.5).clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 3, 0)


def test_modules_equal_the_reference() -> None:
    encoder, decoder = support.modules(CONFIG, TENSORS)
    tokens = support.run(encoder, PIXELS)
    assert tokens.shape == (3, 2, 3)
    np.testing.assert_array_equal(tokens, reference_tokens(PIXELS))
    assert len(np.unique(tokens)) > 8
    decoded = support.run(decoder, tokens)
    assert support.worst(decoded, reference_pixels(tokens)) <= 1
    assert decoded.std() > 10


def test_graphs_equal_the_modules(tmp_path: Path) -> None:
    """Two levels hold every kind of layer; a graph takes any number of latents, one included."""
    tensors = oracle.random_tensors(SHALLOW.expected_shapes(), seed=6)
    encoder, decoder = support.modules(SHALLOW, tensors)
    pixels = support.frames(17, 16, 24)
    tokens = support.run(encoder, pixels)
    to_tokens = support.session(encoder, pixels, tmp_path / "encoder.onnx", opset=18)
    to_pixels = support.session(decoder, tokens, tmp_path / "decoder.onnx", opset=23)
    for latents in (1, 2, 3):
        frames = SHALLOW.frames(latents)
        (found,) = to_tokens.run(None, {"pixels": pixels[:frames]})
        assert support.worst(found, tokens[:latents]) == 0
        (decoded,) = to_pixels.run(None, {"tokens": tokens[:latents]})
        assert support.worst(decoded, support.run(decoder, tokens[:latents])) <= 1


def test_no_latent_depends_on_later_frames() -> None:
    encoder, decoder = support.modules(CONFIG, TENSORS)
    tokens = support.run(encoder, PIXELS)
    other = PIXELS.copy()
    other[9:] = 255 - other[9:]
    changed = support.run(encoder, other)
    np.testing.assert_array_equal(changed[:2], tokens[:2])
    assert (changed[2] != tokens[2]).any()
    swapped = np.concatenate([tokens[:2], changed[2:]])
    assert support.worst(support.run(decoder, swapped)[:9], support.run(decoder, tokens)[:9]) <= 1


def test_a_short_prompt_needs_no_padding() -> None:
    """Encoding 9 frames alone gives the latents of 9 frames filled up with copies of the last one."""
    encoder, _ = support.modules(CONFIG, TENSORS)
    padded = np.concatenate([PIXELS[:9]] + [PIXELS[8:9]] * 8)
    np.testing.assert_array_equal(support.run(encoder, PIXELS[:9]), support.run(encoder, padded)[:2])


def test_the_release_has_the_known_size() -> None:
    shapes = CosmosDvConfig().expected_shapes()
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    encoder = sum(sizes[name] for name in sizes if name.startswith(("encoder.", "quant_conv.")))
    assert len(shapes) == 318
    assert round(encoder / 1e6, 1) == 45.5
    assert round((sum(sizes.values()) - encoder) / 1e6, 1) == 65.4
    assert shapes["quant_conv.conv3d.weight"] == (6, 16, 1, 1, 1)
    released = CosmosDvConfig()
    assert (released.grid, released.codes, released.frames(5)) == ((40, 64), 64000, 33)


def test_frame_counts() -> None:
    assert [CosmosDvConfig().frames(latents) for latents in (1, 2, 5)] == [1, 9, 33]


def test_derived_buffers_are_skipped() -> None:
    for name in ("encoder.patcher3d.wavelets", "quantizer._levels", "inv_quant.quantizer.implicit_codebook"):
        assert CONFIG.rename(name) is None
    assert all(CONFIG.rename(name) == name for name in CONFIG.expected_shapes())


def test_a_frame_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(UsageError, match=r"630.*multiples of 16"):
        CosmosDvConfig(height=630)
