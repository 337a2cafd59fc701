"""Worlds as Gymnasium environments: ``gymnasium.make("diagd/World-v0", bundle="crafter-3m.diagd")``.

``gymnasium.make_vec("diagd/World-v0", num_envs=4, bundle=...)`` has worlds in lock step, in the passes of one
engine. Importing this module registers them. Observations are pictures uint8 [height, width, 3]. A world
model knows no reward and no end: rewards are 0, episodes end where ``max_episode_steps`` ends them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.actions import ActionCodec, EdgesSlot, MuLawSlot
from diagd.engines.engine import Int
from diagd.engines.sampler import check_seed
from diagd.errors import UsageError, expect, require
from diagd.play.controls import Taken, bounded, default_controls
from diagd.play.game import Game
from diagd.play.opening import SHIPPED, GameOptions, open_game, open_games
from diagd.runtime.actions import encode

require("gymnasium", extra="gym", purpose="offer a world as an environment")

import gymnasium  # noqa: E402
from gymnasium import spaces  # noqa: E402
from gymnasium.vector import AutoresetMode, VectorEnv  # noqa: E402
from gymnasium.vector.utils import batch_space, iterate  # noqa: E402

Observation = NDArray[np.uint8]

_KEYS: dict[str, str | int] = {
    "Space": " ",
    "ArrowRight": 0x4000004F,
    "ArrowLeft": 0x40000050,
    "ArrowDown": 0x40000051,
    "ArrowUp": 0x40000052,
}
"""Keys that are no letter or digit, as pygame numbers them (SDL)."""


class WorldEnv(gymnasium.Env[Observation, Any]):
    """One world.

    Actions are those of the model: its one choice as a number, or a dictionary of buttons (0 or 1), choices
    and fields. Models without actions take 0. Without a bundle it is the world that `worlds.ship` made ready;
    ``render_mode`` is ``rgb_array`` or None. A copy, also in another process, opens the bundle again and goes
    on from where this one is, to the token.

    Raises:
        DiagdError: the bundle cannot be played.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        bundle: str | Path | None = None,
        render_mode: str | None = None,
        options: GameOptions | None = None,
    ) -> None:
        expect(WorldEnv.__init__, locals())
        self._made = (SHIPPED if bundle is None else Path(bundle), options or GameOptions())
        self._game = open_game(*self._made)
        self._prompt = 0
        manifest, spec = self._game.bundle.manifest, self._game.view.codec.spec
        self._codec, self.render_mode = manifest.actions, render_mode
        self.metadata = self.metadata | {"render_fps": manifest.frames_per_second}
        self.observation_space = spaces.Box(0, 255, (*spec.size, 3), np.uint8)
        self.action_space = action_space(self._codec)
        self._picture: Observation = np.zeros((*spec.size, 3), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin anew; the seed fixes what is drawn and, without ``options={"prompt": n}``, the prompt."""
        expect(WorldEnv.reset, {"options": options})
        super().reset(seed=seed)
        pictures, self._prompt = _begin(self._game, self.np_random, (options or {}).get("prompt"))
        return self._see(pictures), _told(self._game, self._prompt)

    def step(self, action: Any) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Decode one frame."""
        ids = encoded(self._codec, action)
        shown = self._game.advance(lambda: Taken(ids, {}))
        assert shown is not None
        told = _told(self._game, self._prompt, shown.frame.steps)
        return self._see(shown.pictures), 0.0, False, False, told

    def render(self) -> Observation | None:
        """The picture last seen."""
        return self._picture.copy() if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Give the engine's memory back."""
        self._game.close()

    def get_keys_to_action(self) -> dict[tuple[str | int, ...], Any]:
        """Keys for ``gymnasium.utils.play``, of models with one choice: characters, or pygame's numbers."""
        keys: dict[tuple[str | int, ...], Any] = {}
        if not isinstance(self.action_space, spaces.Discrete) or self._codec is None:
            return keys
        ((field, names),) = self._codec.choices.items()
        for code, part in default_controls(self._codec).keys.items():
            key = _KEYS.get(code, re.sub("^(Key|Digit)", "", code).lower())
            if isinstance(key, int) or len(key) == 1:
                keys[(key,)] = names.index(str(part[field]))
        return keys

    def __getstate__(self) -> dict[str, Any]:
        saved = self._game.snapshot() if self._game.known else None
        return {**vars(self), "_game": saved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._game = open_game(*self._made)
        if state["_game"] is not None:
            self._game.restore(state["_game"])

    def _see(self, pictures: Observation) -> Observation:
        self._picture = pictures[-1]
        return self._picture.copy()


class WorldVectorEnv(VectorEnv[Observation, Any, Any]):
    """Worlds in lock step: a frame of all of them takes the passes of one.

    An environment that is truncated begins anew in the next step, whose action it does not take, or, by
    ``reset(options={"reset_mask": ...})``, when it is asked to. An episode is truncated after
    ``max_episode_steps`` frames; None: never. The rest is as of `WorldEnv`.

    Raises:
        DiagdError: the bundle cannot be played, or not by so many at once.
    """

    autoreset_mode = AutoresetMode.NEXT_STEP  # which TorchRL asks for beside what Gymnasium does
    metadata: dict[str, Any] = WorldEnv.metadata | {"autoreset_mode": autoreset_mode}

    def __init__(
        self,
        num_envs: int,
        bundle: str | Path | None = None,
        max_episode_steps: int | None = None,
        options: GameOptions | None = None,
        render_mode: str | None = None,
    ) -> None:
        expect(WorldVectorEnv.__init__, locals())
        if max_episode_steps is not None and max_episode_steps < 1:
            raise UsageError(
                f"max_episode_steps is {max_episode_steps}; expected 1 or more, or None for no end"
            )
        path = SHIPPED if bundle is None else Path(bundle)
        self._group, self._games = open_games(path, options or GameOptions(), num_envs)
        manifest, spec = self._games[0].bundle.manifest, self._games[0].view.codec.spec
        self._codec, self._horizon, self.num_envs = manifest.actions, max_episode_steps, num_envs
        self.render_mode = render_mode
        self.metadata = self.metadata | {"render_fps": manifest.frames_per_second}
        self.single_observation_space = spaces.Box(0, 255, (*spec.size, 3), np.uint8)
        self.single_action_space = action_space(self._codec)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._randoms: list[np.random.Generator] = [np.random.default_rng() for _ in range(num_envs)]
        self._prompts: NDArray[np.int64] = np.zeros(num_envs, np.int64)
        self._pictures: Observation = np.zeros((num_envs, *spec.size, 3), np.uint8)
        self._steps: NDArray[np.int64] = np.zeros(num_envs, np.int64)
        self._over: NDArray[np.bool_] = np.zeros(num_envs, np.bool_)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin anew, all or those of ``options["reset_mask"]``; environment n has seed ``seed + n``."""
        expect(WorldVectorEnv.reset, {"options": options})
        options = options or {}
        mask = np.ravel(np.asarray(options.get("reset_mask", np.ones(self.num_envs)), np.bool_))
        self._check_count(len(mask), "entries of reset_mask")
        seeds = [seed + n for n in range(self.num_envs)] if isinstance(seed, int | np.integer) else seed
        if seeds is not None:
            self._check_count(len(seeds) if np.iterable(seeds) else 0, "seeds")
        for number, given in enumerate(seeds or ()):
            if given is not None and mask[number]:
                check_seed(given)
                self._randoms[number] = np.random.default_rng(given)
        infos: dict[str, Any] = {}
        for number in np.flatnonzero(mask).tolist():
            infos = self._add_info(infos, self._reset(number, options.get("prompt")), number)
        return self._pictures.copy(), infos

    def step(
        self, actions: Any
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Decode one frame of each environment but those that begin anew."""
        infos: dict[str, Any] = {}
        taken = [Taken(encoded(self._codec, one), {}) for one in iterate(self.action_space, actions)]
        self._check_count(len(taken), "actions")
        over = self._over.copy()  # of which none stays that begins anew
        for number in np.flatnonzero(over).tolist():
            infos = self._add_info(infos, self._reset(number, None), number)
        live = np.flatnonzero(~over).tolist()
        runs = {number: self._games[number].play(partial(taken.__getitem__, number)) for number in live}
        for number, shown in self._group.together(runs):
            self._pictures[number] = shown.pictures[-1]
            told = _told(self._games[number], int(self._prompts[number]), shown.frame.steps)
            infos = self._add_info(infos, told, number)
        self._steps[live] += 1
        if self._horizon is not None:
            self._over = self._steps >= self._horizon
        nothing = np.zeros(self.num_envs)
        return self._pictures.copy(), nothing, nothing > 0, self._over.copy(), infos

    def render(self) -> tuple[Observation, ...] | None:
        """The pictures last seen, by environment."""
        return tuple(self._pictures.copy()) if self.render_mode == "rgb_array" else None

    def close_extras(self, **kwargs: Any) -> None:
        """Give the engine's memory back."""
        del kwargs
        for game in self._games:
            game.close()
        self._group.close()

    def _check_count(self, count: int, what: str) -> None:
        if count != self.num_envs:
            raise UsageError(f"{count} {what}; expected {self.num_envs}, one an environment")

    def _reset(self, number: int, prompt: int | None) -> dict[str, Any]:
        game = self._games[number]
        pictures, chosen = _begin(game, self._randoms[number], prompt)
        self._pictures[number], self._prompts[number] = pictures[-1], chosen
        self._steps[number], self._over[number] = 0, False
        return _told(game, chosen)


def _begin(game: Game, random: np.random.Generator, prompt: int | None) -> tuple[Observation, int]:
    """Begin a world at a prompt, with a seed that is drawn; its pictures, and the prompt's number."""
    drawn = int(random.integers(len(game.prompts)))
    chosen = drawn if prompt is None else prompt
    if chosen not in range(len(game.prompts)):
        raise UsageError(f"no prompt has the number {chosen!r}; there are {len(game.prompts)}, from 0 on")
    game.settings = game.settings.model_copy(update={"seed": int(random.integers(1 << 32))})
    return game.reset(game.prompts[chosen]), chosen


def _told(game: Game, prompt: int, passes: int = 0) -> dict[str, Any]:
    """The prompt, the frame's tokens, and its passes where these follow from seed and actions alone."""
    told = {"prompt": prompt, "tokens": game.tokens}
    ragged = game.settings.open(game.bundle.manifest).ragged
    return told if ragged else told | {"passes": passes}


def encoded(codec: ActionCodec | None, action: Any) -> Int | None:
    """Ids of an action of the space; None for models without actions."""
    if codec is None:
        return None
    choices = codec.choices
    if not isinstance(action, Mapping):
        action = dict.fromkeys(choices, action)
    named = {
        name: _choice(name, choices[name], value) if name in choices else np.asarray(value).tolist()
        for name, value in action.items()
    }
    return encode(codec, bounded(codec, named))


def _choice(name: str, names: Sequence[str], value: Any) -> str:
    number = np.asarray(value)
    if number.dtype.kind not in "biu" or number.size != 1 or not 0 <= number.item() < len(names):
        raise UsageError(f"{name} is {value!r}; expected one of 0..{len(names) - 1}: {', '.join(names)}")
    return names[int(number.item())]


def action_space(codec: ActionCodec | None) -> spaces.Space[Any]:
    """The actions of a model."""
    if codec is None:
        return spaces.Discrete(1)
    if not codec.buttons and not codec.fields and len(codec.choices) == 1:
        return spaces.Discrete(len(next(iter(codec.choices.values()))))
    parts: dict[str, spaces.Space[Any]] = {name: spaces.Discrete(2) for name in sorted(codec.buttons)}
    parts |= {name: spaces.Discrete(len(names)) for name, names in codec.choices.items()}
    for field, count in codec.fields.items():
        low, high = np.zeros((2, count), np.float32)
        for slot in codec.slots:
            if isinstance(slot, MuLawSlot | EdgesSlot) and slot.field == field:
                edges = slot.edges if isinstance(slot, EdgesSlot) else (-slot.limit, slot.limit)
                low[slot.component], high[slot.component] = edges[0], edges[-1]
        parts[field] = spaces.Box(low, high, dtype=np.float32)
    return spaces.Dict(parts)


gymnasium.register(
    "diagd/World-v0", entry_point="diagd.gym:WorldEnv", vector_entry_point="diagd.gym:WorldVectorEnv"
)
