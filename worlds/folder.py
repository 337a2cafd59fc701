"""The folder of a trained world: written, and read for training and evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diagd.bundle import PROMPTS_NAME
from diagd.bundle.files import write_text
from diagd.errors import CheckpointError
from diagd.export.checkpoints import save_tensors
from diagd.export.families.world import (
    DESCRIPTION,
    WEIGHTS,
    WorldDescription,
    load_description,
    load_tokenizer,
)
from diagd.export.transformer import Transformer
from diagd.play.pictures import png


@dataclass(frozen=True)
class World:
    """A trained world model, float32 and in evaluation mode, with the tensors of both pixel graphs."""

    description: WorldDescription
    model: Transformer
    tokenizer: Mapping[str, Tensor]


def save_world(folder: Path, world: World, training: dict[str, Any]) -> None:
    """Write weights (float16), tokenizer and description; ``training`` is kept for the record."""
    state = {name: tensor.to(torch.float16) for name, tensor in world.model.state_dict().items()}
    save_tensors(folder / WEIGHTS, state, {"format": "pt"})
    save_tensors(folder / world.description.tokenizer_file, world.tokenizer)
    description = asdict(world.description) | {"training": training}
    write_text(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")


def save_prompts(folder: Path, frames: Iterable[NDArray[np.uint8]]) -> None:
    """Write pictures uint8 [height, width, 3] that a world starts from, which its exports take along.

    Where there are some they stay as they are.
    """
    if not (prompts := folder / PROMPTS_NAME).exists():
        prompts.mkdir()
        for number, frame in enumerate(frames):
            (prompts / f"{number:02d}.png").write_bytes(png(frame))


def load_world(folder: Path) -> World:
    """Read a world model in float32.

    Raises:
        CheckpointError: files are missing, or do not fit the description.
    """
    description = load_description(folder)
    model = Transformer(description.transformer_config())
    try:
        model.load_state_dict({name: t.float() for name, t in load_file(folder / WEIGHTS).items()})
        _, tokenizer = load_tokenizer(folder)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no readable world model: {error}") from error
    return World(description, model.eval(), tokenizer)
