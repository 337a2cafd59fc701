"""Work on a cluster of two nodes gives what this machine gives, whoever is killed."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diagd.cli.main import main
from diagd.cluster.workers import RayWorkers
from diagd.errors import UsageError
from diagd.tuning.recordings import Episode, load_episode
from tests.cluster.pool_work import Absent, squares
from tests.worlds import ACTIONS, random_world
from worlds.recordings import check_recipe, save_episode, shard_path

pytestmark = pytest.mark.slow


def test_a_killed_actor_is_replaced(nodes: Any, tmp_path: Path) -> None:
    with RayWorkers(partial(squares, tmp_path), nodes.address, 2) as workers:
        assert dict(workers.map(range(6))) == {number: number**2 for number in range(6)}
        assert (tmp_path / "3").exists()
        with pytest.raises(UsageError, match="-1 is negative"):
            list(workers.map([-1]))
        with pytest.raises(UsageError, match="workers were killed"):
            list(workers.map([13]))
    told = r"No module named 'absent'.*each needs the same Python, Ray and diagd"
    with RayWorkers(Absent(), nodes.address, 2) as workers, pytest.raises(UsageError, match=told):
        list(workers.map(range(2)))
    with pytest.raises(UsageError, match="no node of the cluster has 1 cores and 1 GPUs"):
        RayWorkers(partial(squares, tmp_path), nodes.address, 2, gpus=1)


def test_workers_that_wait_for_a_node_say_so(
    nodes: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = RayWorkers(partial(squares, tmp_path), nodes.address, 4)
    assert dict(held.map(range(4, 12))) == {number: (number + 4) ** 2 for number in range(8)}
    held._add(4)  # all cores there are
    monkeypatch.setattr("diagd.cluster.workers._SLOW", 0.5)
    with RayWorkers(partial(squares, tmp_path), nodes.address, 1) as workers:
        ends = threading.Timer(3, held.close)
        ends.start()
        assert dict(workers.map([5])) == {0: 25}
        ends.join()
    assert caplog.text.count("wait until a node has cores") == 1


def test_evaluations_do_not_depend_on_who_does_them(nodes: Any, tmp_path: Path) -> None:
    """In PyTorch, sums of many shapes and rollouts of two parts, to the last bit."""
    world = random_world(tmp_path / "trained", rows=3, columns=4)
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    check_recipe(recordings, {"actions": list(ACTIONS)})
    for n in range(2):
        frames = np.random.default_rng(n).integers(0, 256, (8, 12, 16, 3), dtype=np.uint8)
        save_episode(shard_path(recordings, n), Episode(frames, np.arange(8, dtype=np.uint8) % len(ACTIONS)))
    command = ["eval", str(world), "--data", str(recordings), "--set", "rollouts=18", "--set", "windows=20"]
    command += ["--set", "frames=1", "--order", "k=1 serial"]
    found = {}
    whom = {"one": ("--workers", "1"), "two": ("--workers", "2"), "ray": ("--cluster", nodes.address)}
    for name, who in whom.items():
        assert main([*command, "--output", str(tmp_path / name), *who]) == 0
        found[name] = json.loads((tmp_path / name / "eval.json").read_text())
    assert found["one"] == found["two"] == found["ray"]


def test_episodes_do_not_depend_on_who_plays_them(nodes: Any, tmp_path: Path) -> None:
    command = ["world", "collect", "--episodes", "3", "--steps", "6", "--seed", "4"]
    assert main([*command, str(tmp_path / "here"), "--workers", "1"]) == 0
    assert main([*command, str(tmp_path / "there"), "--cluster", nodes.address]) == 0
    for n in range(3):
        here, there = (load_episode(shard_path(tmp_path / name, n)) for name in ("here", "there"))
        np.testing.assert_array_equal(here.frames, there.frames)
        np.testing.assert_array_equal(here.actions, there.actions)
    nobody = ["--cluster", nodes.address, "--set", "gpus=1"]
    assert main([*command, str(tmp_path / "nowhere"), *nobody]) == 2
    assert not (tmp_path / "nowhere").exists()
