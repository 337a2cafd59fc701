"""Small recordings for the tests: a striped world without Crafter, quick to draw and to learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diagd.export.families.world import PatchGraphs
from diagd.tuning.recordings import Episode, FrameEncoder
from worlds.recordings import check_recipe, save_episode, shard_path

ROWS, COLUMNS, PATCH = 3, 4, 4
ACTIONS = ("stay", "left", "right")


def striped_episode(frames: int, seed: int) -> Episode:
    """Columns of colour on a ring that actions turn by one column: the next frame is fully determined."""
    random = np.random.default_rng(seed)
    actions = random.integers(0, len(ACTIONS), frames).astype(np.uint8)
    actions[0] = 0
    offsets = np.cumsum(np.array([0, -1, 1])[actions]) + random.integers(8)
    colours = np.linspace(0, 255, 8).astype(np.uint8)
    columns = colours[(offsets[:, None] + np.arange(COLUMNS)) % 8]
    pixels = np.repeat(columns, PATCH, axis=1)[:, None, :, None]
    return Episode(np.broadcast_to(pixels, (frames, ROWS * PATCH, COLUMNS * PATCH, 3)).copy(), actions)


def record_stripes(folder: Path, episodes: int, frames: int) -> Path:
    """Write shards of striped episodes."""
    check_recipe(folder, {"actions": list(ACTIONS)})
    for n in range(episodes):
        save_episode(shard_path(folder, n), striped_episode(frames, n))
    return folder


def patch_encoder(codebook: np.ndarray, rows: int = ROWS, columns: int = COLUMNS) -> FrameEncoder:
    """The nearest entry of a codebook uint8 [codes, p, p, 3] for each of rows x columns patches."""
    side = codebook.shape[1]
    graphs = PatchGraphs(rows * side, columns * side, len(codebook), side)
    return FrameEncoder.of_graphs(graphs, {"codebook": torch.from_numpy(codebook)})
