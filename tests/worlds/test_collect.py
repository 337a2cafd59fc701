from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diagd.cluster import ClusterOptions
from diagd.errors import UsageError
from diagd.tuning.recordings import load_episode
from worlds.collect import collect, play_episode
from worlds.options import CollectOptions
from worlds.recordings import shard_path
from worlds.simulator import ACTIONS, Simulator


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> CollectOptions:
    one = ClusterOptions(workers=1)
    options = CollectOptions(tmp_path_factory.mktemp("episodes"), episodes=2, steps=60, seed=5, who=one)
    assert len(list(collect(options))) == 2
    return options


def test_episodes_have_frames_and_actions(recording: CollectOptions) -> None:
    episode = load_episode(shard_path(recording.output, 0))
    assert episode.frames.shape == (60, 72, 96, 3)
    assert episode.actions.shape == (60,)
    assert episode.actions[0] == 0
    assert set(episode.actions.tolist()) <= set(range(len(ACTIONS)))
    assert (episode.frames[1:] != episode.frames[:-1]).any((1, 2, 3)).mean() > 0.3


def test_the_same_seed_records_the_same_episode(recording: CollectOptions) -> None:
    again = play_episode(recording, 1)
    kept = load_episode(shard_path(recording.output, 1))
    np.testing.assert_array_equal(again.frames, kept.frames)
    np.testing.assert_array_equal(again.actions, kept.actions)
    other = load_episode(shard_path(recording.output, 0))
    assert not np.array_equal(kept.frames[0], other.frames[0])


def test_noise_has_the_bits_that_its_library_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Simulator(0)
    from opensimplex import api, internals

    tables, points = api._init(5), np.random.default_rng(0).uniform(-50, 50, (200, 3)).tolist()
    assert type(tables[0]) is list or hasattr(internals._noise3, "py_func")
    found = [internals._noise3(*point, *tables) for point in points]
    monkeypatch.setattr(internals, "GRADIENTS3", np.array(internals.GRADIENTS3))
    assert found == [internals._noise3(*point, *map(np.array, tables)) for point in points]


def test_collecting_resumes(recording: CollectOptions) -> None:
    kept = shard_path(recording.output, 0)
    stamp = kept.stat().st_mtime_ns
    shard_path(recording.output, 1).unlink()
    assert list(collect(recording)) == [shard_path(recording.output, 1)]
    assert kept.stat().st_mtime_ns == stamp
    assert list(collect(recording)) == []


def test_another_recipe_is_refused(recording: CollectOptions) -> None:
    with pytest.raises(UsageError, match="another folder"):
        list(collect(replace(recording, seed=6)))


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 0)
    path.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(UsageError, match=r"episode-000000\.npz is no episode of a recording"):
        load_episode(path)


def test_daylight_never_fades() -> None:
    """Crafter's own day is darkest at step 210."""
    simulator = Simulator(3)
    first = simulator.reset()
    last = [simulator.step(0)[0] for _ in range(210)][-1]
    assert abs(float(last[:56].mean()) - float(first[:56].mean())) < 10


def test_unknown_actions_are_refused() -> None:
    simulator = Simulator(0)
    with pytest.raises(UsageError, match="place_table"):
        simulator.step(len(ACTIONS))
