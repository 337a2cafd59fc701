"""A player on a random map of ground and rock, by rules written out here: true frames of a small world."""

from __future__ import annotations

import numpy as np

from diagd.tuning.recordings import TokenDataset
from worlds.geometry import PLAYER
from worlds.simulator import COLUMNS, ROWS, VIEW_ROWS

GROUND, ROCK, PLAYER_CODE, ICON, CODES = (0, 1, 2), 3, 4, 5, 8


def walk(steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames int [steps, rows, columns] and the actions [steps] that led to them."""
    random = np.random.default_rng(seed)
    world = random.choice([*GROUND, ROCK], (80, 80), p=[0.3, 0.25, 0.25, 0.2])
    y, x = 40, 40
    frames, actions = list[np.ndarray](), []
    for _ in range(steps):
        action = int(random.integers(0, 6))
        dy, dx = {1: (0, -1), 2: (0, 1), 3: (-1, 0), 4: (1, 0)}.get(action, (0, 0))
        if frames and world[y + dy, x + dx] != ROCK:
            y, x = y + dy, x + dx
        view = world[y - 3 : y + 4, x - 6 : x + 6].copy()
        view[PLAYER] = PLAYER_CODE
        frames.append(np.concatenate([view, np.full((ROWS - VIEW_ROWS, COLUMNS), ICON)]))
        actions.append(action)
    return np.stack(frames), np.asarray(actions)


def recording(episodes: int, steps: int) -> TokenDataset:
    """Several walks as a dataset."""
    streams = []
    for seed in range(episodes):
        frames, actions = walk(steps, seed)
        streams.append(np.concatenate([CODES + actions[:, None], frames.reshape(len(frames), -1)], axis=1))
    starts = np.arange(episodes + 1) * steps
    return TokenDataset(np.concatenate(streams).astype(np.int16), starts)
