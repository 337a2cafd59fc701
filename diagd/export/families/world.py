"""Small world models trained with ``diagd world train``, their folder, and the one that is shipped."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from diagd.bundle.actions import ActionCodec, ChoiceSlot
from diagd.bundle.files import atomic_file
from diagd.bundle.manifest import IdRange, SamplingRules
from diagd.bundle.rotary import Axis, Rotary, RotaryAxis, geometric_frequencies
from diagd.bundle.transformer import TransformerConfig
from diagd.errors import CheckpointError, UsageError, unknown
from diagd.export.families.family import Family, identity_rules
from diagd.export.tokenizers.base import TokenizerGraphs
from diagd.export.tokenizers.base import build as build_network
from diagd.schedule import StreamLayout

if TYPE_CHECKING:
    from diagd.export.transformer import Transformer

SHIPPED = Path(__file__).parents[2] / "models"
PATCHES = "diagd.export.tokenizers.patch"
WEIGHTS, CODEBOOK, DESCRIPTION = "model.safetensors", "codebook.safetensors", "config.json"

_FRAME_PAIRS, _FRAME_BASE, _GRID_BASE = 4, 100.0, 50.0


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of the transformer."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int = 32


SIZES = {
    "0.7m": ModelSize(hidden=96, feed_forward=256, layers=6, heads=3, kv_heads=1),
    "3m": ModelSize(hidden=192, feed_forward=512, layers=6, heads=6, kv_heads=2),
    "10m": ModelSize(hidden=384, feed_forward=1024, layers=6, heads=12, kv_heads=4),
}


@dataclass(frozen=True)
class WorldDescription:
    """Everything about a trained world model that its tensors do not say.

    Attributes:
        size: name in `SIZES`.
        rows, columns: cells of a frame.
        patch: pixels along a side of a cell.
        codes: entries of the codebook; ids from here on are actions.
        used_codes: entries that the frames make use of.
        actions: names of the actions, in the order of their ids.
        context_frames: frames of a training window.
    """

    size: str
    rows: int
    columns: int
    patch: int
    codes: int
    used_codes: int
    actions: tuple[str, ...]
    context_frames: int

    @property
    def layout(self) -> StreamLayout:
        """One action token, then the cells it leads to."""
        return StreamLayout(rows=self.rows, columns=self.columns, before=1)

    def transformer_config(self) -> TransformerConfig:
        """Configuration of the transformer: rotary over (frame, row, column), a learned vector per slot.

        Raises:
            UsageError: no such size.
        """
        if self.size not in SIZES:
            raise unknown("size", self.size, SIZES)
        size = asdict(SIZES[self.size])
        frames = geometric_frequencies(2 * _FRAME_PAIRS, _FRAME_BASE)
        grid = geometric_frequencies((size["head_size"] - 2 * _FRAME_PAIRS) // 2, _GRID_BASE)
        axes = (
            RotaryAxis(Axis.FRAME, frames),
            RotaryAxis(Axis.ROW, grid),
            RotaryAxis(Axis.COLUMN, grid),
        )
        return TransformerConfig(
            layout=self.layout,
            context_frames=self.context_frames,
            vocabulary=self.codes + len(self.actions),
            output_vocabulary=self.codes,
            rotary=Rotary(axes),
            slot_embedding=True,
            **size,
        )


@dataclass(frozen=True)
class World:
    """A trained world model.

    Attributes:
        description: its configuration.
        model: float32 transformer, in evaluation mode.
        codebook: uint8 [codes, patch, patch, 3].
    """

    description: WorldDescription
    model: Transformer
    codebook: NDArray[np.uint8]


def save_world(folder: Path, world: World, training: dict[str, Any]) -> None:
    """Write weights (float16), codebook and description; ``training`` is kept for the record."""
    import torch
    from safetensors.numpy import save_file as save_arrays
    from safetensors.torch import save_file

    state = {name: tensor.to(torch.float16).contiguous() for name, tensor in world.model.state_dict().items()}
    with atomic_file(folder / WEIGHTS) as path:
        save_file(state, path, metadata={"format": "pt"})
    with atomic_file(folder / CODEBOOK) as path:
        save_arrays({"codebook": np.ascontiguousarray(world.codebook)}, path)
    with atomic_file(folder / DESCRIPTION) as path:
        path.write_text(
            json.dumps(asdict(world.description) | {"training": training}, indent=2) + "\n", encoding="utf-8"
        )


def load_description(folder: Path) -> WorldDescription:
    """Read the description of a world model.

    Raises:
        CheckpointError: the folder holds none, or one this version cannot read.
    """
    try:
        return TypeAdapter(WorldDescription).validate_json((folder / DESCRIPTION).read_bytes())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder} holds no readable world model: {reason}; name the folder that "
            f"`diagd world train` wrote, or weights beside its {DESCRIPTION}"
        ) from error


def load_codebook(folder: Path) -> NDArray[np.uint8]:
    """Read the codebook uint8 [codes, patch, patch, 3] of a world model.

    Raises:
        CheckpointError: there is none, or the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        codebook: NDArray[np.uint8] = load_file(folder / CODEBOOK)["codebook"]
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / CODEBOOK} holds no codebook: {error}; copy the folder of the world again"
        ) from error
    if codebook.dtype != np.uint8 or codebook.ndim != 4:
        raise CheckpointError(f"{folder / CODEBOOK} holds {codebook.dtype} {list(codebook.shape)}, no codes")
    return codebook


def load_world(folder: Path) -> World:
    """Read a world model in float32.

    Raises:
        CheckpointError: files are missing, or do not fit the description.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from diagd.export.transformer import Transformer

    description = load_description(folder)
    model = Transformer(description.transformer_config())
    try:
        model.load_state_dict({name: t.float() for name, t in load_file(folder / WEIGHTS).items()})
        codebook = load_codebook(folder)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no readable world model: {error}") from error
    return World(description, model.eval(), codebook)


def build(name: str, checkpoint: str | None) -> Family:
    """A trained world from its folder; ``crafter-3m`` has one of its own.

    Raises:
        UsageError: no folder is known.
    """
    shipped = SHIPPED / name
    if checkpoint is None and not shipped.is_dir():
        raise UsageError(
            f"model '{name}' needs --checkpoint FOLDER, the folder that `diagd world train` wrote"
        )
    weights = Path(checkpoint).expanduser() if checkpoint else shipped
    folder = weights if weights.is_dir() or not weights.exists() else weights.parent
    description = load_description(folder)
    config = description.transformer_config()
    return Family(
        name=name,
        family="world",
        title=f"{name}: {description.context_frames} frames of {description.rows} x {description.columns}",
        transformer=config,
        rules=identity_rules(config),
        prefixes=("",),
        sampling=SamplingRules(ranges=(IdRange(low=0, high=description.used_codes),), top_p=0.95),
        order="k=1 serial",
        frames_per_second=10.0,
        licence="Apache-2.0; trained on frames of Crafter (MIT)" if not checkpoint else "yours",
        origin="shipped with diagd" if not checkpoint else str(folder),
        actions=_codec(description),
        tokenizer=_tokenizer(description),
        default_checkpoint=str(folder / WEIGHTS if folder is weights else weights),
        default_tokenizer=str(folder / CODEBOOK),
    )


def _codec(description: WorldDescription) -> ActionCodec:
    return ActionCodec(
        slots=(ChoiceSlot(field="action", names=description.actions, first=description.codes),)
    )


def _tokenizer(description: WorldDescription) -> TokenizerGraphs:
    shape = (description.codes, description.patch, description.patch, 3)
    return TokenizerGraphs(
        height=description.rows * description.patch,
        width=description.columns * description.patch,
        grid=(description.rows, description.columns),
        codes=description.codes,
        temporal_factor=1,
        chunk_frames=64,
        build_encoder=partial(build_network, PATCHES, "PatchEncoder.empty", shape),
        build_decoder=partial(build_network, PATCHES, "PatchDecoder.empty", shape),
        parameters=math.prod(shape),
        rename=lambda name: name,
    )
