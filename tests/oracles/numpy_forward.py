"""The networks of the releases in NumPy float64, on tensors under their released names.

Written from the description of the released networks, tensor by tensor and head by head; nothing here is
shared with the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Weights = Mapping[str, Array]

RMS_EPSILON = LAYER_EPSILON = 1e-5


def rms(x: Array, weight: Array) -> Array:
    made: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + RMS_EPSILON) * weight
    return made


def layer_norm(x: Array, weight: Array | float, bias: Array | float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred * centred).mean(-1, keepdims=True) + LAYER_EPSILON)
    made: Array = centred / deviation * weight + bias
    return made


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    made: Array = weights / weights.sum(-1, keepdims=True)
    return made


def silu(x: Array) -> Array:
    made: Array = x / (1 + np.exp(-x))
    return made


def gelu_tanh(x: Array) -> Array:
    made: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return made


def heads_of(x: Array, size: int) -> list[Array]:
    return [x[:, start : start + size] for start in range(0, x.shape[1], size)]


def attend(queries: list[Array], keys: list[Array], values: list[Array], visible: NDArray[np.bool_]) -> Array:
    """Query head h uses key head h // (H / G); heads side by side."""
    shared = len(queries) // len(keys)
    out = []
    for head, query in enumerate(queries):
        scores = query @ keys[head // shared].T / math.sqrt(query.shape[1])
        out.append(softmax(np.where(visible, scores, -np.inf)) @ values[head // shared])
    return np.concatenate(out, axis=1)


def rotate_half(v: Array, half_angles: Array) -> Array:
    angles = np.concatenate([half_angles, half_angles], axis=1)
    first, second = np.split(v, 2, axis=1)
    made: Array = v * np.cos(angles) + np.concatenate([-second, first], axis=1) * np.sin(angles)
    return made


def layers_in(weights: Weights, prefix: str) -> int:
    return 1 + max(
        int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix)
    )


def mineworld(
    weights: Weights, ids: Ints, positions: Ints, visible: NDArray[np.bool_], head_size: int
) -> Array:
    """Llama; names ``model.*`` and ``lm_head.weight``. Returns logits [rows, vocabulary]."""
    angles = positions[:, None] * 10000.0 ** (-2 * np.arange(head_size // 2) / head_size)
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(layers_in(weights, "model.layers.")):
        w = {n.removeprefix(f"model.layers.{layer}."): t for n, t in weights.items()}
        normed = rms(x, w["input_layernorm.weight"])
        q, k, v = (heads_of(normed @ w[f"self_attn.{c}_proj.weight"].T, head_size) for c in "qkv")
        q, k = [rotate_half(h, angles) for h in q], [rotate_half(h, angles) for h in k]
        x = x + attend(q, k, v, visible) @ w["self_attn.o_proj.weight"].T
        normed = rms(x, w["post_attention_layernorm.weight"])
        gate, up = (normed @ w[f"mlp.{c}_proj.weight"].T for c in ("gate", "up"))
        x = x + (silu(gate) * up) @ w["mlp.down_proj.weight"].T
    return rms(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


@dataclass(frozen=True)
class CosmosShape:
    """Grid (frames, rows, columns) and what the tensors do not tell."""

    frames: int
    rows: int
    columns: int
    head_size: int
    yarn: bool
    begin_token: bool


def cosmos(
    weights: Weights,
    ids: Ints,
    positions: Ints,
    visible: NDArray[np.bool_],
    shape: CosmosShape,
    text: Array | None = None,
) -> Array:
    """Cosmos autoregressive; names as in model.pt without ``model.``. Returns logits [rows, vocabulary]."""
    size = shape.head_size
    t, y, x_axis = grid_coordinates(positions, shape)
    on_grid = positions >= int(shape.begin_token)
    angles = rope_3d(t, y, x_axis, shape) * on_grid[:, None]
    x = weights["tok_embeddings.weight"][ids]
    additive = sinusoids(t, y, x_axis, x.shape[1]) * on_grid[:, None]
    for layer in range(layers_in(weights, "layers.")):
        w = {n.removeprefix(f"layers.{layer}."): a for n, a in weights.items()}
        if text is not None:
            x = x + additive
        normed = rms(x, w["attention_norm.weight"])
        q, k, v = (heads_of(normed @ w[f"attention.{c}.weight"].T, size) for c in ("wq", "wk", "wv"))
        q = [rotate_half(rms(h, w["attention.q_norm.weight"]), angles) for h in q]
        k = [rotate_half(rms(h, w["attention.k_norm.weight"]), angles) for h in k]
        x = x + attend(q, k, v, visible) @ w["attention.wo.weight"].T
        if text is not None:
            normed = rms(x, w["cross_attention_norm.weight"])
            q = heads_of(normed @ w["cross_attention.wq.weight"].T, size)
            k = heads_of(text @ w["cross_attention.wk.weight"].T, size)
            v = heads_of(text @ w["cross_attention.wv.weight"].T, size)
            q = [rms(h, w["cross_attention.q_norm.weight"]) for h in q]
            k = [rms(h, w["cross_attention.k_norm.weight"]) for h in k]
            everything = np.ones((len(ids), len(text)), bool)
            x = x + attend(q, k, v, everything) @ w["cross_attention.wo.weight"].T
        normed = rms(x, w["ffn_norm.weight"])
        gated = silu(normed @ w["feed_forward.w1.weight"].T) * (normed @ w["feed_forward.w3.weight"].T)
        x = x + gated @ w["feed_forward.w2.weight"].T
    return rms(x, weights["norm.weight"]) @ weights["output.weight"].T


def grid_coordinates(positions: Ints, shape: CosmosShape) -> tuple[Ints, Ints, Ints]:
    """Frame, row and column of each position; the begin token's are meaningless."""
    p = np.maximum(positions - int(shape.begin_token), 0)
    per_frame = shape.rows * shape.columns
    return p // per_frame, p % per_frame // shape.columns, p % shape.columns


def rope_3d(t: Ints, y: Ints, x: Ints, shape: CosmosShape) -> Array:
    """Angles [rows, head_size / 2]: time channels, then rows, then columns; theta 500000."""
    d_space = shape.head_size // 6 * 2
    d_time = shape.head_size - 2 * d_space
    f_time = np.array([500000.0 ** (-2 * i / d_time) for i in range(d_time // 2)])
    f_space = np.array([500000.0 ** (-2 * i / d_space) for i in range(d_space // 2)])
    if shape.yarn:
        f_time, f_space = yarn(f_time, 3), yarn(f_space, 40)
    return np.concatenate([np.outer(t, f_time), np.outer(y, f_space), np.outer(x, f_space)], axis=1)


def yarn(frequencies: Array, length: int) -> Array:
    """beta_fast 4, beta_slow 1, scale 2; no factor of magnitude."""
    high, low = 2 * math.pi * 4 / length, 2 * math.pi * 1 / length
    result = []
    for f in frequencies:
        m = min(1.0, max(0.0, (f - low) / (high - low)))
        result.append(f * ((1 - m) / 2 + m))
    return np.array(result)


def sinusoids(t: Ints, y: Ints, x: Ints, width: int) -> Array:
    """Additive table [rows, width] rounded to bfloat16: time, rows, columns, each [sin | cos]."""
    d_space = width // 6 * 2
    parts = []
    for coordinate, d in ((t, width - 2 * d_space), (y, d_space), (x, d_space)):
        angles = np.outer(coordinate, 10000.0 ** (-np.arange(d // 2) / (d / 2)))
        parts += [np.sin(angles), np.cos(angles)]
    return bfloat16(np.concatenate(parts, axis=1))


def bfloat16(x: Array) -> Array:
    """Round to nearest even at 8 bits of significand."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def wham(weights: Weights, ids: Ints, positions: Ints, visible: NDArray[np.bool_], heads: int) -> Array:
    """nanoGPT; names ``transformer.*``, both block versions. Returns logits [rows, vocabulary]."""
    table = weights["transformer.wte.weight"]
    x = table[ids] + weights["transformer.wpe.weight"][positions]
    size = x.shape[1] // heads

    def norm(v: Array, name: str) -> Array:
        return layer_norm(v, weights.get(f"{name}.weight", 1.0), weights.get(f"{name}.bias", 0.0))

    def linear(v: Array, name: str) -> Array:
        return v @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    for layer in range(layers_in(weights, "transformer.h.")):
        name = f"transformer.h.{layer}"
        q, k, v = np.split(linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn"), 3, axis=1)
        mixed = attend(heads_of(q, size), heads_of(k, size), heads_of(v, size), visible)
        x = x + linear(mixed, f"{name}.attn.c_proj")
        inner = gelu_tanh(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"))
        x = x + linear(inner, f"{name}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ table.T
