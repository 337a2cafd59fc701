"""Small world models trained with ``diagd world train``, their folder, and the one that is shipped.

The compact tokenizer is convolutional with finite scalar quantisation, every frame by itself. Each
resolution halves the picture at once, so that hardly any work is done on pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from diagd.bundle import PROMPTS_NAME
from diagd.bundle.actions import ActionCodec, ChoiceSlot
from diagd.bundle.manifest import IdRange, SamplingRules
from diagd.bundle.transformer import Axis, Rotary, RotaryAxis, TransformerConfig, geometric_frequencies
from diagd.errors import CheckpointError, UsageError, unknown
from diagd.export.families import Family, identity_rules
from diagd.export.tokenizers.base import TokenizerGraphs, grid_of
from diagd.schedule import StreamLayout

if TYPE_CHECKING:
    from torch import Tensor


LEVELS = {256: (8, 8, 4), 512: (8, 8, 8), 1000: (8, 5, 5, 5)}
"""Values that each quantised channel takes, by the number of ids (Mentzer et al. 2023, section 4.1)."""

CHANNELS = {4: (32, 64), 8: (32, 64, 96), 16: (32, 64, 96, 128)}
"""By the pixels along a side of a cell."""

SHIPPED = Path(__file__).parents[2] / "models"

_FRAMES_OF = {"crafter-3m": "Crafter (MIT)", "doom-3m": "Freedoom (BSD-3-Clause)"}
"""Where the frames came from that shipped worlds were trained on, and its licence."""

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"

CODEBOOK, TOKENIZER = "codebook.safetensors", "tokenizer.safetensors"

_FRAME_PAIRS, _FRAME_BASE, _GRID_BASE = 4, 100.0, 50.0


@dataclass(frozen=True)
class CompactConfig:
    """Sizes of the tokenizer.

    Attributes:
        levels: values that each quantised channel can take.
        channels: of each resolution, finest first; the first is half the picture's.
        res_blocks: residual blocks of the coarsest resolution; in the decoder the others have one each.
    """

    levels: tuple[int, ...]
    channels: tuple[int, ...]
    res_blocks: int = 2

    @classmethod
    def of_codes(cls, codes: int, patch: int) -> CompactConfig:
        """The tokenizer of so many ids, each for ``patch`` x ``patch`` pixels; UsageError: none is known."""
        if codes not in LEVELS:
            raise unknown("number of codes", str(codes), [str(known) for known in LEVELS])
        if patch not in CHANNELS:
            raise unknown("patch", str(patch), [str(known) for known in CHANNELS])
        return cls(LEVELS[codes], CHANNELS[patch])

    @property
    def factor(self) -> int:
        """Pixels per token along each axis."""
        return 1 << len(self.channels)

    @property
    def codes(self) -> int:
        """Number of ids."""
        return math.prod(self.levels)


@dataclass(frozen=True)
class CompactGraphs(TokenizerGraphs):
    """The tokenizer at one frame size."""

    sizes: CompactConfig

    network = "world_network:Compact"
    chunk_frames = 64

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return grid_of(self.height, self.width, self.sizes.factor)

    @property
    def codes(self) -> int:
        """Number of ids."""
        return self.sizes.codes


@dataclass(frozen=True)
class PatchGraphs(TokenizerGraphs):
    """A codebook of patches of ``side`` x ``side`` pixels."""

    codes: int = 512
    side: int = 8

    network = "world_network:Patch"
    chunk_frames = 64

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return grid_of(self.height, self.width, self.side)

    def parameter_count(self) -> int:
        """All numbers of the codebook."""
        return self.codes * self.side**2 * 3


HEAD_SIZE = 32

SIZES: dict[str, dict[str, Any]] = {
    "0.3m": {"hidden": 96, "feed_forward": 256, "layers": 3, "heads": 3, "kv_heads": 1},
    "0.7m": {"hidden": 96, "feed_forward": 256, "layers": 6, "heads": 3, "kv_heads": 1},
    "3m": {"hidden": 192, "feed_forward": 512, "layers": 6, "heads": 6, "kv_heads": 2},
    "10m": {"hidden": 384, "feed_forward": 1024, "layers": 6, "heads": 12, "kv_heads": 4},
}
"""Dimensions of the transformer."""


@dataclass(frozen=True)
class WorldDescription:
    """Everything about a trained world model that its tensors do not say.

    Attributes:
        size: name in `SIZES`.
        rows, columns: cells of a frame.
        patch: pixels along a side of a cell.
        codes: ids of the tokenizer; ids from here on are actions.
        used_codes: those that the frames make use of, from 0 on.
        actions: names of the actions, in the order of their ids.
        context_frames: frames of a training window.
        tokenizer: sizes of the trained tokenizer; None where each patch is an entry of a codebook.
    """

    size: str
    rows: int
    columns: int
    patch: int
    codes: int
    used_codes: int
    actions: tuple[str, ...]
    context_frames: int
    tokenizer: CompactConfig | None = None

    @property
    def layout(self) -> StreamLayout:
        """One action token, then the cells it leads to."""
        return StreamLayout(rows=self.rows, columns=self.columns, before=1)

    @property
    def tokenizer_file(self) -> str:
        """Name of the file that holds the tensors of both pixel graphs."""
        return CODEBOOK if self.tokenizer is None else TOKENIZER

    def pixel_graphs(self) -> TokenizerGraphs:
        """Encoder and decoder of the frames."""
        size = self.rows * self.patch, self.columns * self.patch
        if self.tokenizer is not None:
            return CompactGraphs(*size, self.tokenizer)
        return PatchGraphs(*size, self.codes, self.patch)

    def transformer_config(self) -> TransformerConfig:
        """Rotary over (frame, row, column), a learned vector per slot; UsageError: no size is so called."""
        if self.size not in SIZES:
            raise unknown("size", self.size, SIZES)
        frames = geometric_frequencies(2 * _FRAME_PAIRS, _FRAME_BASE)
        grid = geometric_frequencies((HEAD_SIZE - 2 * _FRAME_PAIRS) // 2, _GRID_BASE)
        axes = (RotaryAxis(Axis.FRAME, frames), RotaryAxis(Axis.ROW, grid), RotaryAxis(Axis.COLUMN, grid))
        return TransformerConfig(
            layout=self.layout,
            context_frames=self.context_frames,
            vocabulary=self.codes + len(self.actions),
            output_vocabulary=self.codes,
            rotary=Rotary(axes),
            slot_embedding=True,
            head_size=HEAD_SIZE,
            **SIZES[self.size],
        )


def load_description(folder: Path) -> WorldDescription:
    """Read what a folder says of a world; CheckpointError: nothing that this version can read."""
    try:
        return TypeAdapter(WorldDescription).validate_json((folder / DESCRIPTION).read_bytes())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder} holds no readable world model: {reason}; name the folder that "
            f"`diagd world train` wrote, or weights beside its {DESCRIPTION}"
        ) from error


def load_tokenizer(folder: Path) -> tuple[TokenizerGraphs, Mapping[str, Tensor]]:
    """The pixel graphs of a world and their tensors; CheckpointError: missing, damaged or of another one."""
    description = load_description(folder)
    graphs = description.pixel_graphs()
    return graphs, read_tokenizer(folder / description.tokenizer_file, graphs)


def read_tokenizer(path: Path, graphs: TokenizerGraphs) -> Mapping[str, Tensor]:
    """Read the tensors of both pixel graphs; see `load_tokenizer`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # not mapped: training writes the file again, and Windows replaces none that is
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} holds no tokenizer: {error}; copy the folder of the world again"
        ) from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != (expected := graphs.expected_shapes()):
        wrong = dict(sorted(found.items() ^ expected.items())[:2])
        raise CheckpointError(f"{path} holds another tokenizer than its {DESCRIPTION} says: {wrong}")
    return tensors


def build(name: str, checkpoint: str | None) -> Family:
    """A trained world from its folder, or a shipped one; UsageError where none is there."""
    shipped = SHIPPED / name
    if checkpoint is None and not shipped.is_dir():
        raise UsageError(
            f"model '{name}' needs --checkpoint FOLDER, the folder that `diagd world train` wrote"
        )
    weights = Path(checkpoint).expanduser() if checkpoint else shipped
    if not weights.exists():
        here = f", or leave --checkpoint out: {name} is shipped with diagd" if shipped.is_dir() else ""
        raise UsageError(f"there is no {weights}; give the folder that `diagd world train` wrote{here}")
    folder = weights if weights.is_dir() else weights.parent
    description = load_description(folder)
    config = description.transformer_config()
    prompts = (folder if checkpoint else shipped / "ready") / PROMPTS_NAME
    actions = ChoiceSlot(field="action", names=description.actions, first=description.codes)
    return Family(
        name=name,
        family="world",
        transformer=config,
        rules=identity_rules(config),
        prefixes=("",),
        sampling=SamplingRules(ranges=(IdRange(low=0, high=description.used_codes),), top_p=0.95),
        order="k=1 serial",
        frames_per_second=10.0,
        licence="yours" if checkpoint else f"Apache-2.0; trained on frames of {_FRAMES_OF[name]}",
        origin="shipped with diagd" if not checkpoint else str(folder),
        actions=ActionCodec(slots=(actions,)),
        tokenizer=description.pixel_graphs(),
        decoder="order" if checkpoint or name != "crafter-3m" else "jacobi",  # measured: as fast, and exact
        default_checkpoint=str(folder / WEIGHTS if folder is weights else weights),
        default_tokenizer=str(folder / description.tokenizer_file),
        prompts=prompts if prompts.is_dir() else None,
    )
