from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diagd.errors import UsageError
from diagd.runtime.video import VideoWriter
from diagd.tuning.recordings import load_episode
from tests.worlds.recordings import ACTIONS, striped_episode
from worlds.collect import import_videos
from worlds.options import ImportOptions
from worlds.recordings import recorded_actions


def record(folder: Path, name: str, frames: int, lines: int | None = None) -> None:
    episode = striped_episode(frames, seed=frames)
    pixels = episode.frames.repeat(4, axis=1).repeat(4, axis=2)
    with VideoWriter(folder / f"{name}.mp4", 10, pixels.shape[1:3]) as video:
        for frame in pixels:
            video.write(frame)
    actions = [{"action": ACTIONS[a]} for a in episode.actions[:lines]]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, actions)) + "\n")


def test_videos_become_episodes(tmp_path: Path) -> None:
    record(tmp_path, "first", 6)
    record(tmp_path, "second", 9)
    options = ImportOptions(tmp_path, tmp_path / "episodes", ACTIONS, (12, 16))
    shards = list(import_videos(options))
    assert len(shards) == 2
    assert recorded_actions(options.output) == ACTIONS
    episode, original = load_episode(shards[1]), striped_episode(9, seed=9)
    np.testing.assert_array_equal(episode.actions, original.actions)
    assert episode.frames.shape == original.frames.shape
    assert np.abs(episode.frames.astype(int) - original.frames).mean() < 12
    assert list(import_videos(options)) == []


def test_missing_lines_and_videos_are_named(tmp_path: Path) -> None:
    options = ImportOptions(tmp_path, tmp_path / "episodes", ACTIONS, (12, 16))
    with pytest.raises(UsageError, match=r"no \.jsonl"):
        list(import_videos(options))
    record(tmp_path, "short", 6, lines=5)
    with pytest.raises(UsageError, match="5 actions but its video 6 frames"):
        list(import_videos(options))
    (tmp_path / "short.mp4").rename(tmp_path / "short.MP4")
    (tmp_path / "short.jsonl").rename(tmp_path / "short.JSONL")
    with pytest.raises(UsageError, match="5 actions but its video 6 frames"):
        list(import_videos(options))
    with pytest.raises(UsageError, match="a name is given twice"):
        replace(options, actions=("noop", "noop"))
    (tmp_path / "short.MP4").unlink()
    with pytest.raises(UsageError, match="exactly one video"):
        list(import_videos(options))


def test_a_folder_without_an_episode_is_recorded_as_is_said(tmp_path: Path) -> None:
    record(tmp_path, "one", 6)
    options = ImportOptions(tmp_path, tmp_path / "episodes", ("noop",), (12, 16))
    with pytest.raises(UsageError, match="unknown action"):
        list(import_videos(options))
    assert len(list(import_videos(replace(options, actions=ACTIONS)))) == 1
    with pytest.raises(UsageError, match="use another folder"):
        list(import_videos(options))


def test_a_video_that_is_added_later_is_imported_once_whatever_its_name(tmp_path: Path) -> None:
    options = ImportOptions(tmp_path, tmp_path / "episodes", ACTIONS, (12, 16))
    record(tmp_path, "b", 6)
    (first,) = import_videos(options)
    before = first.read_bytes()
    record(tmp_path, "a", 9)
    (second,) = import_videos(options)
    assert [len(load_episode(shard).frames) for shard in (first, second)] == [6, 9]
    assert first.read_bytes() == before
    for suffix in (".mp4", ".jsonl"):
        (tmp_path / f"b{suffix}").rename(tmp_path / f"c[1]{suffix}")
        (tmp_path / f"._a{suffix}").write_bytes(b"what another system keeps beside a file")
    assert list(import_videos(options)) == []
