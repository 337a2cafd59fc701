"""Crafter, headless: the seeded world the shipped model is trained on."""

from __future__ import annotations

from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.errors import UsageError

ACTIONS = ("noop", "left", "right", "up", "down", "do", "place_stone", "place_table")
"""Names of the actions, in the order of their ids."""

SCROLL = {1: (0, -1), 2: (0, 1), 3: (-1, 0), 4: (1, 0)}
"""Action id -> (rows, columns) the player moves, hence the view scrolls."""

TILE = 8
"""Pixels along a side of a tile."""

ROWS, COLUMNS, VIEW_ROWS = 9, 12, 7
"""Tiles of a frame; the first VIEW_ROWS rows show the world, the others the inventory."""

_CRAFTER_NAMES = {name: f"move_{name}" for name in ("left", "right", "up", "down")}
_AREA = (64, 64)


class Simulator:
    """One Crafter world in permanent daylight, a function of its seed and the actions alone."""

    def __init__(self, seed: int) -> None:
        import crafter
        import crafter.worldgen

        _hasten_noise(crafter.worldgen.opensimplex)
        self._ids = _action_ids(crafter)
        self._env = crafter.Env(
            area=_AREA, view=(COLUMNS, ROWS), size=(COLUMNS * TILE, ROWS * TILE), seed=seed
        )
        _make_reproducible(self._env)

    def reset(self) -> NDArray[np.uint8]:
        """Generate the next world of this seed and show its first frame, uint8 [72, 96, 3] RGB."""
        return np.ascontiguousarray(self._env.reset())

    def step(self, action: int) -> tuple[NDArray[np.uint8], bool]:
        """Apply one action; returns the frame it causes, and whether the episode ends with it.

        Raises:
            UsageError: an action id outside `ACTIONS`.
        """
        if not 0 <= action < len(ACTIONS):
            raise UsageError(f"action {action} is not one of 0..{len(ACTIONS) - 1} ({', '.join(ACTIONS)})")
        frame, _, over, _ = self._env.step(self._ids[action])
        return np.ascontiguousarray(frame), bool(over)


def _action_ids(crafter: ModuleType) -> list[int]:
    names = list(crafter.constants.actions)
    return [names.index(_CRAFTER_NAMES.get(name, name)) for name in ACTIONS]


def _hasten_noise(library: Any) -> None:
    """Have noise of worlds made of plain numbers: the same bits in a quarter of the time of NumPy's."""
    with suppress(AttributeError):
        plain, make = library.internals, library.internals._init
        compiled = hasattr(plain._noise3, "py_func")  # by Numba, where it is installed
        if isinstance(plain.GRADIENTS3, np.ndarray) and not compiled:
            library.api._init = lambda seed: [table.tolist() for table in make(seed)]
            plain.GRADIENTS3 = plain.GRADIENTS3.tolist()


def _make_reproducible(env: Any) -> None:
    """Fix the daylight, skip the unused semantic view, and order what Crafter keeps in sets.

    Crafter picks the creature to remove by its place in a set, which follows memory addresses.
    """
    balance = type(env)._balance_chunk

    def daylight() -> None:
        env._world.daylight = 1.0

    def balance_ordered(chunk: Any, creatures: Any) -> None:
        balance(env, chunk, sorted(creatures, key=lambda creature: tuple(creature.pos)))

    env._update_time = daylight
    env._balance_chunk = balance_ordered
    env._sem_view = lambda: None
    env._local_view._light = lambda canvas, _daylight: canvas
