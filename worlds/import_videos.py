"""Turns a folder of videos with action lines into episodes to train on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diagd.bundle.actions import ActionCodec, ChoiceSlot
from diagd.errors import UsageError
from diagd.runtime.actions import read_actions
from diagd.runtime.video import read_frames
from diagd.tuning.recordings import Episode, check_recipe, save_episode, shard_path

MAX_ACTIONS = 256


@dataclass(frozen=True)
class ImportOptions:
    """What `diagd world import` reads.

    Attributes:
        videos: folder in which each video has its actions beside it: ``run.mp4`` and ``run.jsonl``, a line
            such as ``{"action": "left"}`` for the action that led to each frame; the first has no effect.
        output: folder of the episodes.
        actions: names of the actions, in the order of their ids; the first is the default.
        size: (height, width) in pixels that the frames are resized to.
    """

    videos: Path
    output: Path
    actions: tuple[str, ...]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if not 1 <= len(self.actions) <= MAX_ACTIONS:
            raise UsageError(f"{len(self.actions)} actions; expected 1 to {MAX_ACTIONS} names")


def import_videos(options: ImportOptions) -> Iterator[Path]:
    """Write an episode for each video, yielding it; episodes already there are kept.

    Raises:
        UsageError: no video with actions, a broken one, or as many lines as frames are not there.
    """
    lines = sorted(options.videos.glob("*.jsonl"))
    if not lines:
        raise UsageError(f"{options.videos} holds no .jsonl of actions beside a video; see docs/world.md")
    check_recipe(options.output, {"size": list(options.size), "actions": list(options.actions)})
    for index, path in enumerate(lines):
        shard = shard_path(options.output, index)
        if not shard.exists():
            save_episode(shard, _episode(path, options))
            yield shard


def _episode(lines: Path, options: ImportOptions) -> Episode:
    codec = ActionCodec(slots=(ChoiceSlot(field="action", names=options.actions, first=0),))
    actions = read_actions(lines, codec)[:, 0].astype(np.uint8)
    frames = read_frames(_video(lines), options.size, resize=True)
    if len(frames) != len(actions):
        raise UsageError(
            f"{lines} has {len(actions)} actions but its video {len(frames)} frames; give one a frame"
        )
    return Episode(frames, actions)


def _video(lines: Path) -> Path:
    found = [path for path in lines.parent.glob(f"{lines.stem}.*") if path != lines]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UsageError(f"{lines} needs exactly one video called {lines.stem}.*, found {names}")
    return found[0]
