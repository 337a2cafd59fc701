"""Worlds as Gymnasium environments: ``gymnasium.make("diagd/World-v0", bundle="crafter-3m.diagd")``.

Importing this module registers them. Observations are pictures uint8 [height, width, 3]. A world model knows
no reward and no end: rewards are 0, episodes end where ``max_episode_steps`` ends them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.actions import ActionCodec, EdgesSlot, MuLawSlot
from diagd.errors import UsageError, require
from diagd.play.controls import Taken, bounded, default_controls
from diagd.play.opening import SHIPPED, GameOptions, open_game
from diagd.runtime.actions import encode

require("gymnasium", extra="gym", purpose="offer a world as an environment")

import gymnasium  # noqa: E402
from gymnasium import spaces  # noqa: E402

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
    and fields. Models without actions take 0.

    Args:
        bundle: default: the world that `worlds.ship` made ready.
        render_mode: ``rgb_array``, or None.
        options: what it runs on.

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
        self._game = open_game(Path(bundle) if bundle else SHIPPED, options or GameOptions())
        manifest, spec = self._game.bundle.manifest, self._game.view.codec.spec
        self._codec, self.render_mode = manifest.actions, render_mode
        self.metadata = self.metadata | {"render_fps": manifest.frames_per_second}
        self.observation_space = spaces.Box(0, 255, (spec.height, spec.width, 3), np.uint8)
        self.action_space = action_space(self._codec)
        self._picture: Observation = np.zeros((spec.height, spec.width, 3), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin anew; the seed fixes what is drawn and, without ``options={"prompt": n}``, the prompt."""
        super().reset(seed=seed)
        game, prompts = self._game, self._game.prompts
        chosen = (options or {}).get("prompt", int(self.np_random.integers(len(prompts))))
        if not 0 <= chosen < len(prompts):
            raise UsageError(f"no prompt has the number {chosen}; there are {len(prompts)}")
        drawn = int(self.np_random.integers(1 << 32))
        game.settings = game.settings.model_copy(update={"seed": drawn})
        return self._see(game.reset(prompts[chosen])), {"prompt": chosen, "tokens": game.tokens}

    def step(self, action: Any) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Decode one frame."""
        ids = None
        if self._codec is not None:
            ids = encode(self._codec, bounded(self._codec, self._named(action)))
        shown = self._game.advance(lambda: Taken(ids, {}))
        assert shown is not None
        info = {"tokens": shown.frame.tokens, "passes": shown.frame.steps}
        return self._see(shown.pictures), 0.0, False, False, info

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

    def _see(self, pictures: Observation) -> Observation:
        self._picture = pictures[-1]
        return self._picture.copy()

    def _named(self, action: Any) -> Mapping[str, Any]:
        assert self._codec is not None
        choices = self._codec.choices
        if isinstance(self.action_space, spaces.Discrete):
            ((field, names),) = choices.items()
            return {field: names[int(action)]}
        return {
            name: choices[name][int(value)] if name in choices else np.asarray(value).tolist()
            for name, value in action.items()
        }


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


gymnasium.register("diagd/World-v0", entry_point="diagd.gym:WorldEnv")
