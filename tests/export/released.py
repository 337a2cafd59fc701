"""Small models in the released file formats, and what the tests compare them with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diagd.export.checkpoints import check, open_checkpoint, select
from diagd.export.families import Family
from diagd.export.transformer import Transformer
from diagd.schedule import StreamLayout
from tests.oracles.numpy_forward import Array, Weights


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights that spread the logits: every parameter is random, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[name] = noise * 0.1 if name.endswith("bias") else 1 + 0.3 * noise
        else:
            tensors[name] = noise * (0.7 if "emb" in name or "wte" in name else shape[1] ** -0.5)
    return tensors


def module_of(family: Family, path: Path) -> Transformer:
    """The transformer with the weights of a released file, read as the exporter reads them."""
    checkpoint = select(open_checkpoint(str(path)), family.rename)
    check(checkpoint, family.expected)
    state = {}
    for name, source in family.weights(checkpoint).items():
        chunks = [np.asarray(chunk, np.float32) for chunk in source.chunks()]
        state[name] = torch.from_numpy(np.concatenate(chunks).reshape(source.shape))
    model = Transformer(family.transformer)
    model.load_state_dict(state)
    return model.eval()


def arrays_of(tensors: Mapping[str, Tensor]) -> Weights:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def random_rows(
    layout: StreamLayout, frames: int, ids: int, seed: int = 3
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Ids, positions in scrambled order and a random causal mask of a whole context, [R], [R], [R, R]."""
    random = np.random.default_rng(seed)
    positions = random.permutation(layout.frame_start(frames))
    behind = positions[None, :] <= positions[:, None]
    visible = behind & (random.random(behind.shape) < 0.7) | np.eye(len(positions), dtype=bool)
    return random.integers(0, ids, len(positions)), positions, visible


def logits_of(
    model: Transformer,
    ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    visible: NDArray[np.bool_],
    text: Array | None = None,
) -> NDArray[np.float32]:
    """Logits [R, V] of the module."""
    with torch.no_grad():
        logits = model(
            torch.from_numpy(ids)[None],
            torch.from_numpy(positions),
            torch.from_numpy(visible),
            None if text is None else torch.from_numpy(text).float(),
        )
    made: NDArray[np.float32] = logits[0].numpy()
    return made
