"""Small world models with random weights, in the folder that training writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diagd.export.families.world import WorldDescription
from diagd.export.transformer import Transformer
from worlds.folder import World, save_world

ACTIONS = ("noop", "left", "right", "up", "down")


def random_world(folder: Path, rows: int = 9, columns: int = 12, size: str = "0.3m") -> Path:
    """A world of patches of 4 pixels that nobody trained; its tokens are lively, not sensible."""
    description = WorldDescription(
        size=size,
        rows=rows,
        columns=columns,
        patch=4,
        codes=32,
        used_codes=30,
        actions=ACTIONS,
        context_frames=4,
    )
    random = torch.Generator().manual_seed(0)
    model = Transformer(description.transformer_config()).initialise(random)
    with torch.no_grad():
        model.embedding.mul_(50)
        for name, gain in model.named_parameters():
            if "norm" in name:  # equal gains would be merged in the graph
                gain.uniform_(0.8, 1.2, generator=random)
    codebook = np.random.default_rng(0).integers(0, 256, (32, 4, 4, 3), dtype=np.uint8)
    codebook[30:] = codebook[0]  # as the codes that training does not use
    folder.mkdir(parents=True)
    save_world(folder, World(description, model, {"codebook": torch.from_numpy(codebook)}), {})
    return folder
