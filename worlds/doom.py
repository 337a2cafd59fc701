"""Doom, headless: a textured world of corridors and doors, walked through by a random explorer.

ViZDoom runs the first level of Freedoom without monsters. What it shows follows from seed and actions alone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diagd.errors import DiagdError

ACTIONS = ("stay", "forward", "back", "left", "right", "use")
"""Names of the actions, in the order of their ids."""

HEIGHT, WIDTH = 72, 96

STAY, FORWARD, BACK, LEFT, RIGHT, USE = range(len(ACTIONS))

_TICS = 4
"""Of the game's 35 a second; the last of so many is a frame."""

_TURN = 3.0
"""Degrees a tic."""

_BUTTONS = {
    STAY: [0.0, 0.0, 0.0, 0.0],
    FORWARD: [1.0, 0.0, 0.0, 0.0],
    BACK: [0.0, 1.0, 0.0, 0.0],
    LEFT: [0.0, 0.0, -_TURN, 0.0],
    RIGHT: [0.0, 0.0, _TURN, 0.0],
    USE: [0.0, 0.0, 0.0, 1.0],
}

_HIDDEN = ("hud", "weapon", "crosshair", "decals", "particles", "messages", "screen_flashes")
_ARGUMENTS = "+sv_nomonsters 1 +movebob 0 +cl_showsecretmessage 0"
_EYE_LEVEL = slice(110, 130)
_LEFT_SIDE, _AHEAD, _RIGHT_SIDE = slice(0, 60), slice(130, 190), slice(260, 320)
_NEAR = 9.0
_BLOCKED = 6.0


class View(NamedTuple):
    """What the explorer sees.

    Attributes:
        left, ahead, right: mean depth at eye level, of 0 to 255.
        blocked: the last step forward led nowhere.
    """

    left: float
    ahead: float
    right: float
    blocked: bool


def play(seed: int, steps: int) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Walk at most ``steps`` frames: uint8 [72, 96, 3] and the action that led to it, the first `STAY`.

    Raises:
        DiagdError: ViZDoom is not installed.
    """
    policy, action, place = explore(np.random.default_rng(seed)), STAY, np.full(2, np.inf)
    next(policy)
    with _game(seed) as game:
        for _ in range(steps):
            if game.is_episode_finished():
                return
            state = game.get_state()
            yield _frame(state.screen_buffer), action
            moved = float(np.abs(state.game_variables - place).sum())
            place = state.game_variables.copy()
            action = policy.send(_view(state.depth_buffer, action == FORWARD and moved < _BLOCKED))
            game.make_action(_BUTTONS[action], _TICS)


def explore(random: np.random.Generator) -> Generator[int, View, None]:
    """Endless actions that lead through rooms: prime it, then send what is seen and receive the next action.

    It walks and turns at random, tries to open what is in its way, and turns towards the open.
    """
    view = yield STAY
    while True:
        if view.blocked or view.ahead < _NEAR:
            plan = _open_door(random) if random.random() < 0.4 else _turn(random, view, 2, 9)
        else:
            plan = _wander(random, view)
        for action in plan:
            view = yield action
            if action == FORWARD and (view.blocked or view.ahead < _NEAR / 3):
                break


def _open_door(random: np.random.Generator) -> list[int]:
    return [USE] + [STAY] * int(random.integers(2, 6)) + [FORWARD] * 3


def _turn(random: np.random.Generator, view: View, least: int, most: int) -> list[int]:
    is_left = random.random() < (view.left + 2) / (view.left + view.right + 4)
    return [LEFT if is_left else RIGHT] * int(random.integers(least, most))


def _wander(random: np.random.Generator, view: View) -> list[int]:
    choice = random.random()
    if choice < 0.72:
        return [FORWARD] * int(random.integers(3, 12))
    if choice < 0.93:
        return _turn(random, view, 1, 6)
    return ([STAY] if choice < 0.96 else [BACK]) * int(random.integers(1, 4))


@contextmanager
def _game(seed: int) -> Iterator[Any]:
    try:
        import vizdoom
    except ImportError as error:
        raise DiagdError(
            "recording Doom needs ViZDoom, which is not installed; run, in a clone of the repository: "
            "pip install './worlds[doom]'"
        ) from error
    game, buttons, variables = vizdoom.DoomGame(), vizdoom.Button, vizdoom.GameVariable
    game.set_doom_scenario_path(str(Path(vizdoom.__file__).parent / "freedoom2.wad"))
    game.set_doom_map("map01")
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    for name in _HIDDEN:
        getattr(game, f"set_render_{name}")(False)
    game.set_available_buttons(
        [buttons.MOVE_FORWARD, buttons.MOVE_BACKWARD, buttons.TURN_LEFT_RIGHT_DELTA, buttons.USE]
    )
    game.set_available_game_variables([variables.POSITION_X, variables.POSITION_Y])
    game.add_game_args(_ARGUMENTS)
    game.set_episode_timeout(0)
    game.set_window_visible(False)
    game.set_seed(seed)
    _start(game)
    try:
        yield game
    finally:
        game.close()


def _start(game: Any) -> None:
    """Start the engine in a folder of its own: it reads its settings there, and leaves files behind."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            game.init()
        finally:
            os.chdir(here)


def _frame(screen: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(screen).resize((WIDTH, HEIGHT), Image.Resampling.BOX))


def _view(depth: NDArray[np.uint8], blocked: bool) -> View:
    band = depth[_EYE_LEVEL]
    left, ahead, right = (float(band[:, part].mean()) for part in (_LEFT_SIDE, _AHEAD, _RIGHT_SIDE))
    return View(left, ahead, right, blocked)
