"""Float64 NumPy layers that the reference tokenizers of these tests are written in."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Weights:
    """Tensors of a checkpoint below a dotted prefix."""

    def __init__(self, tensors: dict[str, NDArray[np.float32]], prefix: str = "") -> None:
        self.tensors = tensors
        self.prefix = prefix

    def __getitem__(self, name: str) -> Array:
        return self.tensors[f"{self.prefix}{name}"].astype(np.float64)

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.tensors

    def get(self, name: str, default: float) -> Array | float:
        found = self.tensors.get(f"{self.prefix}{name}")
        return default if found is None else found.astype(np.float64)

    def at(self, *path: object) -> Weights:
        return Weights(self.tensors, self.prefix + ".".join(map(str, path)) + ".")


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, NDArray[np.float32]]:
    """Values that keep activations near one: gains about 1, the rest by fan-in."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            values *= 1.4 / np.sqrt(np.prod(shape[1:]))
        elif name.endswith(".weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.1
        tensors[name] = values.astype(np.float32)
    return tensors


def convolve(x: Array, w: Weights, stride: tuple[int, ...] = (1, 1)) -> Array:
    """Correlate [C, *size] with weight [O, C, *kernel], no padding, plus the bias."""
    weight = w["weight"]
    kernel = weight.shape[2:]
    out = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:], kernel, stride, strict=True)]
    total: Array = np.zeros((weight.shape[0], *out))
    for taps in product(*map(range, kernel)):
        window = tuple(slice(t, t + s * (n - 1) + 1, s) for t, s, n in zip(taps, stride, out, strict=True))
        tap: tuple[Any, ...] = (slice(None), slice(None), *taps)
        seen: tuple[Any, ...] = (slice(None), *window)
        total += np.tensordot(weight[tap], x[seen], axes=1)
    return total + w["bias"].reshape(-1, *[1] * len(kernel))


def same(x: Array, w: Weights) -> Array:
    """3 x 3 convolution of [C, H, W] with a border of zeros."""
    return convolve(np.pad(x, [(0, 0), (1, 1), (1, 1)]), w)


def group_norm(x: Array, w: Weights, groups: int) -> Array:
    """Normalise [C, ...] over each group of channels and all other axes."""
    rows = x.reshape(groups, -1)
    rows = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-6)
    affine = [w[name].reshape(-1, *[1] * (x.ndim - 1)) for name in ("weight", "bias")]
    made: Array = rows.reshape(x.shape) * affine[0] + affine[1]
    return made


def silu(x: Array) -> Array:
    made: Array = x / (1 + np.exp(-x))
    return made


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    made: Array = e / e.sum(-1, keepdims=True)
    return made


def repeat2(x: Array) -> Array:
    """Every pixel of [C, H, W] as a block of 2 x 2."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def resnet(x: Array, w: Weights, shortcut: str, groups: int = 32) -> Array:
    hidden = same(silu(group_norm(x, w.at("norm1"), groups)), w.at("conv1"))
    hidden = same(silu(group_norm(hidden, w.at("norm2"), groups)), w.at("conv2"))
    return hidden + (convolve(x, w.at(shortcut)) if f"{shortcut}.weight" in w else x)


def attention(x: Array, w: Weights, groups: int = 32) -> Array:
    """Single-head attention among the pixels of [C, H, W], added to it."""
    normed = group_norm(x, w.at("norm"), groups)
    q, k, v = (convolve(normed, w.at(name)).reshape(len(x), -1) for name in "qkv")
    mixed = v @ softmax(q.T @ k / np.sqrt(len(x))).T
    return x + convolve(mixed.reshape(x.shape), w.at("proj_out"))


def nearest(latents: Array, codebook: Array) -> NDArray[np.intp]:
    """Index of the nearest row for each column of [D, H, W]."""
    distances = np.linalg.norm(latents[None] - codebook[:, :, None, None], axis=1)
    made: NDArray[np.intp] = distances.argmin(0)
    return made
