"""Worlds that an action changes in a way that can be counted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diagd.schedule import StreamLayout
from tests.oracles.models import CODES

LAYOUT = StreamLayout(3, 5, prefix=1, before=1, after=1)
"""The action stands behind the frame it is taken at, and again ahead of the next one."""

STAY = CODES + 1


def walks(count: int, frames: int, seed: int = 0) -> NDArray[np.int64]:
    """Windows int64 [count, N] of frames whose columns scroll left, stay or scroll right."""
    random = np.random.default_rng(seed)
    actions = random.integers(-1, 2, (count, frames))
    cells = random.integers(0, CODES, (count, frames, LAYOUT.rows, LAYOUT.columns))
    for frame in range(1, frames):
        for window, action in enumerate(actions[:, frame]):
            fresh = cells[window, frame].copy()
            cells[window, frame] = np.roll(cells[window, frame - 1], -action, axis=1)
            if action:
                column = -1 if action == 1 else 0
                cells[window, frame, :, column] = fresh[:, column]
    return _streams(cells, actions)


def colours(count: int, frames: int, seed: int = 0, *, shades: int = 6) -> NDArray[np.int64]:
    """Windows of frames in one of three colours, the one of the action, of so many shades each."""
    random = np.random.default_rng(seed)
    actions = random.integers(-1, 2, (count, frames))
    cells = random.integers(0, shades, (count, frames, LAYOUT.rows, LAYOUT.columns))
    return _streams(cells + 6 * (actions + 2)[..., None, None], actions)


def greys(count: int, frames: int, seed: int = 0, *, shades: int = 6) -> NDArray[np.int64]:
    """Windows of frames in one colour, all under one action."""
    random = np.random.default_rng(seed)
    cells = random.integers(0, shades, (count, frames, LAYOUT.rows, LAYOUT.columns))
    return _streams(cells, np.zeros((count, frames), np.int64))


def _streams(cells: NDArray[np.int64], actions: NDArray[np.int64]) -> NDArray[np.int64]:
    count, frames = actions.shape
    known = STAY + actions
    behind = np.concatenate([known[:, 1:], np.full((count, 1), STAY)], axis=1)
    rows = np.concatenate([known[..., None], cells.reshape(count, frames, -1), behind[..., None]], axis=2)
    prefix = np.full((count, LAYOUT.prefix), STAY)
    return np.concatenate([prefix, rows.reshape(count, -1)], axis=1).astype(np.int64)
