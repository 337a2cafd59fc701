from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diagd.cluster import ClusterOptions
from diagd.errors import UsageError
from diagd.tuning.recordings import Episode, load_episode
from worlds.collect import collect, play_episode
from worlds.doom import ACTIONS, BACK, FORWARD, HEIGHT, LEFT, RIGHT, STAY, USE, WIDTH, View, explore
from worlds.options import CollectOptions
from worlds.recordings import recorded_actions

STEPS = 60


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Episode:
    pytest.importorskip("vizdoom")
    one = ClusterOptions(workers=1)
    options = CollectOptions(
        tmp_path_factory.mktemp("doom"), game="doom", episodes=1, steps=STEPS, seed=3, who=one
    )
    (path,) = collect(options)
    assert recorded_actions(options.output) == ACTIONS
    return load_episode(path)


def test_a_walk_has_frames_and_the_actions_that_led_to_them(walk: Episode) -> None:
    assert walk.frames.shape == (STEPS, HEIGHT, WIDTH, 3)
    assert walk.actions[0] == STAY
    moved = (walk.frames[1:] != walk.frames[:-1]).any((1, 2, 3))
    turns = np.isin(walk.actions[1:], (LEFT, RIGHT))
    assert turns.sum() > 5
    assert moved[turns].all()


def test_turns_move_the_picture_against_them(walk: Episode) -> None:
    """What is ahead moves right on a turn to the left: the best shift of the middle rows has its sign."""
    grey = walk.frames[:, 24:48].mean((1, 3))
    for action, sign in ((LEFT, 1), (RIGHT, -1)):
        for n in np.flatnonzero(walk.actions[1:] == action):
            before, after = grey[n], grey[n + 1]
            differences = {
                shift: np.abs(after[20 + shift : 76 + shift] - before[20:76]).mean()
                for shift in range(-20, 21)
            }
            if differences[0] > 4:  # else the picture is too uniform to tell
                assert np.sign(min(differences, key=lambda shift: differences[shift])) == sign


def test_the_same_seed_plays_the_same_walk(
    walk: Episode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is played, and nothing is left there."""
    monkeypatch.chdir(tmp_path)
    options = CollectOptions(tmp_path, game="doom", steps=20, seed=3)
    again, other = play_episode(options, 0), play_episode(options, 1)
    np.testing.assert_array_equal(again.frames, walk.frames[:20])
    np.testing.assert_array_equal(again.actions, walk.actions[:20])
    assert not np.array_equal(other.actions, again.actions)
    assert not list(tmp_path.iterdir())


def test_the_explorer_turns_to_the_open_and_tries_what_is_in_its_way() -> None:
    policy = explore(np.random.default_rng(0))
    assert next(policy) == STAY
    facing = [policy.send(View(left=60, ahead=2, right=1, blocked=False)) for _ in range(300)]
    assert facing.count(LEFT) > 5 * facing.count(RIGHT)
    assert USE in facing
    open_ground = [policy.send(View(left=50, ahead=50, right=50, blocked=False)) for _ in range(600)]
    assert set(open_ground) >= {STAY, FORWARD, BACK, LEFT, RIGHT}
    assert open_ground.count(FORWARD) > 300


def test_unknown_games_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="known: crafter, doom"):
        CollectOptions(tmp_path, game="quake")
