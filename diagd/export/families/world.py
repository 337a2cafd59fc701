"""Small world models trained with ``diagd world train``, and the one that is shipped."""

from __future__ import annotations

from pathlib import Path

import torch

from diagd.bundle.actions import ActionCodec, ChoiceSlot
from diagd.bundle.manifest import DefaultSchedule, IdRange, SamplingRules
from diagd.errors import UsageError
from diagd.export.families.family import Family, identity_rules
from diagd.export.tokenizers.base import TokenizerGraphs
from diagd.export.tokenizers.patch import PatchDecoder, PatchEncoder
from diagd.world.model import CODEBOOK, WEIGHTS, WorldDescription, load_description

SHIPPED = Path(__file__).parents[2] / "models"


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
    folder = Path(checkpoint) if checkpoint else shipped
    folder = folder if folder.is_dir() else folder.parent
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
        schedule=DefaultSchedule(k=1),
        frames_per_second=10.0,
        licence="Apache-2.0; trained on frames of Crafter (MIT)" if not checkpoint else "yours",
        origin="shipped with diagd" if not checkpoint else str(folder),
        actions=_codec(description),
        tokenizer=_tokenizer(description),
        default_checkpoint=str(folder / WEIGHTS),
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
        build_encoder=lambda: PatchEncoder(torch.zeros(shape, dtype=torch.uint8)),
        build_decoder=lambda: PatchDecoder(torch.zeros(shape, dtype=torch.uint8)),
        rename=lambda name: name,
    )
