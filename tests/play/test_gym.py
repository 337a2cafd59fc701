"""Worlds as Gymnasium environments."""

from __future__ import annotations

import copy
import os
import pickle
import re
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import diagd.gym
from diagd.errors import BundleError, UsageError
from diagd.export.families.mineworld import mineworld_actions
from diagd.export.families.wham import wham_actions
from diagd.gym import WorldEnv, WorldVectorEnv
from diagd.play.controls import bounded
from diagd.play.opening import SHIPPED
from diagd.runtime.actions import encode


def make(bundle: Path, **options: Any) -> gymnasium.Env:
    return gymnasium.make("diagd/World-v0", bundle=bundle, **options)


@pytest.mark.parametrize("shipped", [False, True], ids=["by a schedule", "by jacobi"])
def test_it_passes_the_checker(world: Path, shipped: bool) -> None:
    env = make(SHIPPED if shipped else world, render_mode="rgb_array")
    check_env(env.unwrapped)
    env.reset(seed=0)
    assert ("passes" in env.step(0)[4]) != shipped  # which differ from run to run by Jacobi decoding
    env.close()


def test_a_seed_gives_the_same_episode_and_a_prompt_can_be_chosen(world: Path) -> None:
    env = make(world)
    episodes = []
    for seed in (3, 3, 4):
        first, info = env.reset(seed=seed, options={"prompt": 1})
        assert info["prompt"] == 1
        episodes.append([first, *(env.step(action)[0] for action in (1, 2, 3, 0))])
    assert all(map(np.array_equal, episodes[0], episodes[1]))
    assert not all(map(np.array_equal, episodes[0], episodes[2]))
    assert not np.array_equal(env.reset(options={"prompt": 0})[0], episodes[0][0])
    for wrong in (9, -1, "9", 1.5):
        with pytest.raises(UsageError, match=re.escape(repr(wrong))):
            env.reset(options={"prompt": wrong})
    for action in (-1, 99, 1.5, "left", None, [1, 2]):
        with pytest.raises(UsageError, match=r"expected one of 0\.\."):
            env.unwrapped.step(action)
    env.close()


def test_a_thousand_random_steps_keep_memory_flat(world: Path) -> None:
    env = make(world)
    env.reset(seed=0)
    env.action_space.seed(0)

    def walk(steps: int) -> int:
        for _ in range(steps):
            _, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert (reward, terminated, truncated) == (0.0, False, False)
            assert info["passes"] > 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = walk(300)
    assert walk(700) - before < 8 << 10  # KiB
    env.close()


def test_without_actions_zero_goes_on(temporal: Path) -> None:
    env = make(temporal)
    env.reset(seed=0)
    assert env.step(0)[0].shape == (16, 32, 3)
    env.close()


def test_many_worlds_at_once_are_each_as_one_alone(world: Path) -> None:
    """Same seeds, same actions: the same pictures, also where one begins anew, alone or at its horizon."""
    many: Any = gymnasium.make_vec(
        "diagd/World-v0", num_envs=3, bundle=world, max_episode_steps=3, render_mode="rgb_array"
    )
    seen, info = many.reset(seed=np.int64(5))
    assert many.metadata["render_modes"] == ["rgb_array"]
    alone = [make(world, max_episode_steps=3) for _ in range(3)]
    for n, env in enumerate(alone):
        first, told = env.reset(seed=5 + n)
        np.testing.assert_array_equal(first, seen[n])
        assert told["prompt"] == info["prompt"][n]
    for actions in ([1, 2, 3], [0, 0, 4], [2, 1, 1]):
        seen, rewards, terminated, truncated, info = many.step(np.array(actions))
        for n, env in enumerate(alone):
            one, *_, over, told = env.step(actions[n])
            np.testing.assert_array_equal(one, seen[n])
            assert over == truncated[n]
            assert told["passes"] == info["passes"][n]
        assert not rewards.any() and not terminated.any()
    assert truncated.all()
    np.testing.assert_array_equal(many.render(), seen)
    first = many.step(np.zeros(3, np.int64))[0]  # all begin anew
    for n, env in enumerate(alone):
        np.testing.assert_array_equal(env.reset()[0], first[n])
    kept = many.step(np.array([1, 1, 1]))[0]
    seen, _ = many.reset(seed=[8, 8, 8], options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(seen[1], alone[1].reset(seed=8)[0])
    np.testing.assert_array_equal(seen[::2], kept[::2])
    for wrong in (
        partial(many.step, np.zeros(2, np.int64)),
        partial(many.reset, seed=[1, 2, 3, 4]),
        partial(many.reset, options={"reset_mask": np.ones(2, np.bool_)}),
    ):
        with pytest.raises(UsageError, match="expected 3, one an environment"):
            wrong()
    codec = many.unwrapped._games[0].view.codec
    for env in (*alone, many):
        env.close()
    assert not codec._graphs
    for again in (partial(many.step, np.zeros(3, np.int64)), many.reset, alone[0].reset):
        with pytest.raises(UsageError, match="closed"):
            again()
    assert not codec._graphs


def test_a_copy_goes_on_where_it_was_made(world: Path) -> None:
    """As one does that is sent to another process; and what was not begun yet can be sent too."""
    env = make(world)
    copies = [pickle.loads(pickle.dumps(env))]
    env.action_space.seed(3)
    env.reset(seed=3)
    copies[0].reset(seed=3)
    env.step(1)
    copies[0].step(1)
    copies.append(copy.deepcopy(env))
    drawn = [[one.action_space.sample() for _ in range(9)] for one in (env, copies[1])]
    assert drawn[0] == drawn[1]
    for action in (2, 0, 1):
        seen, *_, told = env.step(action)
        for other in copies:
            same, *_, info = other.step(action)
            np.testing.assert_array_equal(same, seen)
            assert info["prompt"] == told["prompt"]
    first = env.reset()[0]
    for other in copies:
        np.testing.assert_array_equal(other.reset()[0], first)
        other.close()
    env.close()


@pytest.mark.parametrize("shipped", [False, True], ids=["by a schedule", "by jacobi"])
def test_infos_have_the_same_names_from_the_first_on(world: Path, shipped: bool) -> None:
    """Minari and TorchRL make columns of them."""
    env = make(SHIPPED if shipped else world)
    many = gymnasium.make_vec("diagd/World-v0", num_envs=2, bundle=SHIPPED if shipped else world)
    assert env.reset(seed=0)[1].keys() == env.step(0)[4].keys() >= {"prompt", "tokens"}
    assert many.reset(seed=0)[1].keys() == many.step(np.array([0, 0]))[4].keys()
    env.close()
    many.close()


def test_what_no_world_can_be_made_of_is_named(world: Path) -> None:
    make_one: Any
    for make_one in (WorldEnv, partial(WorldVectorEnv, 1)):
        with pytest.raises(UsageError, match="bundle is 3; expected a string or a Path or None"):
            make_one(3)
        with pytest.raises(BundleError):
            make_one("")
        with pytest.raises(UsageError, match=r"options is .*; expected a GameOptions or None"):
            make_one(world, options={"prompts": ()})
    horizon: Any
    for horizon in ("x", 0):
        with pytest.raises(UsageError, match=f"max_episode_steps is {horizon!r}; expected"):
            WorldVectorEnv(1, world, horizon)
    env = make(world)
    with pytest.raises(UsageError, match="options is 'x'; expected a dict or None"):
        env.reset(options="x")  # type: ignore[arg-type]
    many: Any = WorldVectorEnv(2, world)
    for seed, message in ((2.5, "0 seeds; expected 2"), ([-1, 3], "seed is -1; expected an integer")):
        with pytest.raises(UsageError, match=message):
            many.reset(seed=seed)
    many.reset(options={"reset_mask": np.array([[True, False]])})
    many.close()


class Interrupt:
    """Ctrl-C at one of the lines that are run in functions of some name, or of any, of the package."""

    def __init__(self, name: str) -> None:
        self._name, self._left, self.lines = name, 0, 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if f"{os.sep}diagd{os.sep}" not in frame.f_code.co_filename:
            return None
        if event == "line" and frame.f_code.co_name.startswith(self._name):
            self.lines, self._left = self.lines + 1, self._left - 1
            if not self._left:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self

    def during(self, step: Callable[[], object], at: int = 0) -> object:
        """What came of it; whoever has the error has all that was under way, as a notebook does."""
        self._left, before = at, sys.gettrace()
        sys.settrace(self)
        try:
            return step()
        except KeyboardInterrupt as error:
            return error
        finally:
            sys.settrace(before)


@pytest.mark.parametrize(
    ("shipped", "name", "known"),
    [(False, "", 2), (False, "", 3), (True, "_lay_out", 2)],
    ids=["within a frame", "where it begins anew", "between lanes"],
)
def test_a_step_that_was_interrupted_is_taken_again(
    world: Path, shipped: bool, name: str, known: int
) -> None:
    """And whatever begins anew behind it has the pictures that it always has."""
    bundle = SHIPPED if shipped else world
    env: Any = gymnasium.make_vec("diagd/World-v0", num_envs=2, bundle=bundle, max_episode_steps=3)
    actions = np.array([[1, 2], [3, 0], [2, 2], [0, 0], [1, 3]])

    def walk(steps: int) -> list[Any]:
        return [env.reset(seed=3)[0], *(env.step(one)[0] for one in actions[:steps])]

    whole = walk(5)
    walk(known)
    interrupt, step = Interrupt(name), partial(env.step, actions[known])
    interrupt.during(step)
    stride, interrupted = interrupt.lines // 12, 0
    for at in range(1, 10 * stride, stride):  # by Jacobi decoding not as many lines each time
        walk(known)
        error = interrupt.during(step, at)
        interrupted += isinstance(error, KeyboardInterrupt)
        step()
        env.step(actions[0])
        np.testing.assert_array_equal(walk(5), whole)
    assert interrupted > 3
    env.close()


def test_every_action_of_the_large_models_can_be_encoded() -> None:
    for codec in (mineworld_actions(), wham_actions()):
        space = diagd.gym.action_space(codec)
        space.seed(0)
        for _ in range(50):
            action = {name: np.asarray(value).tolist() for name, value in space.sample().items()}
            assert len(encode(codec, bounded(codec, action))) == len(codec.slots)


def test_keys_are_those_of_the_page(world: Path) -> None:
    env = make(world)
    assert isinstance(env.unwrapped, diagd.gym.WorldEnv)
    keys = env.unwrapped.get_keys_to_action()
    assert keys[("a",)] == keys[(0x40000050,)] == 1  # pygame.K_LEFT
    assert len(keys) == 8
    env.close()


def test_it_can_be_played(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is held in pygame's own queue for a few frames, then the window is closed."""
    pygame = pytest.importorskip("pygame")
    monkeypatch.setitem(os.environ, "SDL_VIDEODRIVER", "dummy")
    from gymnasium.utils.play import play

    env, actions = make(world, render_mode="rgb_array"), []

    def watch(_before: object, _after: object, action: object, *_: object) -> None:
        actions.append(action)
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_a))
        if len(actions) == 4:
            pygame.event.post(pygame.event.Event(pygame.QUIT))

    play(env, callback=watch, noop=0, fps=1000)
    assert actions[0] == 0
    assert actions[2:] == [1, 1]
