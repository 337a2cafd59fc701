"""Recordings of a world: episodes of a game, each a function of its seed alone, and videos of any world."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import cache
from diagd.bundle.actions import ActionCodec, ChoiceSlot
from diagd.cluster import open_workers
from diagd.errors import UsageError
from diagd.runtime.actions import read_actions
from diagd.runtime.pictures import files_in, read_frames
from diagd.tuning.recordings import Episode
from worlds import doom
from worlds.options import CollectOptions, ImportOptions
from worlds.recordings import check_recipe, episode_sources, save_episode, shard_path
from worlds.simulator import ACTIONS, Simulator

_MOVES, _INTERACTIONS = (1, 2, 3, 4), (5, 0, 6, 7)
_INTERACTION_SHARES = (0.6, 0.2, 0.1, 0.1)


def play_episode(options: CollectOptions, index: int) -> Episode:
    """Play episode `index` of the game with its random policy."""
    frames, actions = zip(*GAMES[options.game].play(options, index), strict=True)
    return Episode(np.stack(frames), np.asarray(actions, np.uint8))


def collect(options: CollectOptions) -> Iterator[Path]:
    """Record the episodes that `options.output` lacks, yielding each shard as it is written.

    Raises:
        UsageError: the folder holds shards recorded with other options.
    """
    recipe = {
        "seed": options.seed,
        "steps": options.steps,
        "move_share": options.move_share,
        "actions": list(GAMES[options.game].actions),
    }
    check_recipe(options.output, recipe, note=False)
    missing = [n for n in range(options.episodes) if not shard_path(options.output, n).exists()]
    make = partial(partial, play_episode, options)
    with open_workers(make, options.who) as workers:
        check_recipe(options.output, recipe)
        for number, episode in workers.map(missing):
            path = shard_path(options.output, missing[number])
            save_episode(path, episode)
            yield path


def _play_crafter(options: CollectOptions, index: int) -> Iterator[Played]:
    simulator = Simulator(options.seed + index)
    policy = random_policy(np.random.default_rng((options.seed, index)), options.move_share)
    yield simulator.reset(), 0
    for action in islice(policy, options.steps - 1):
        frame, over = simulator.step(action)
        yield frame, action
        if over:
            return


def random_policy(random: np.random.Generator, move_share: float) -> Iterator[int]:
    """Endless actions: walks of 1 to 8 steps with probability ``move_share``, else 1 to 3 interactions."""
    while True:
        if random.random() < move_share:
            action, held = int(random.choice(_MOVES)), int(random.integers(1, 9))
        else:
            action = int(random.choice(_INTERACTIONS, p=_INTERACTION_SHARES))
            held = int(random.integers(1, 4))
        yield from [action] * held


Played = tuple[NDArray[np.uint8], int]
"""A frame uint8 [H, W, 3] and the action that led to it."""


class Game(NamedTuple):
    """A game that can be recorded.

    Attributes:
        actions: their names, in the order of their ids; the first does nothing.
        play: an episode, of the options and its index; a function of these alone.
    """

    actions: tuple[str, ...]
    play: Callable[[CollectOptions, int], Iterator[Played]]


GAMES = {
    "crafter": Game(ACTIONS, _play_crafter),
    "doom": Game(doom.ACTIONS, lambda options, index: doom.play(options.seed + index, options.steps)),
}
"""By name."""


def import_videos(options: ImportOptions) -> Iterator[Path]:
    """Write an episode for each video that none was made of yet, yielding it; those already there are kept.

    Videos are known by their content and that of their lines: names and order do not matter.

    Raises:
        UsageError: no video with actions, a broken one, or as many lines as frames are not there.
    """
    lines = files_in(options.videos, (".jsonl",))
    if not lines:
        raise UsageError(f"{options.videos} holds no .jsonl of actions beside a video; see docs/world.md")
    recipe = {"size": list(options.size), "actions": list(options.actions)}
    check_recipe(options.output, recipe, note=False)
    known, index = episode_sources(options.output), 0
    for path in lines:
        video = _video_of(path)
        source = hashlib.sha256(f"{cache.digest(video)} {cache.digest(path)}".encode()).hexdigest()
        if source in known:
            continue
        episode = replace(_read_video(path, video, options), source=source)
        check_recipe(options.output, recipe)
        while (shard := shard_path(options.output, index)).exists():
            index += 1
        save_episode(shard, episode)
        known.add(source)
        yield shard


def _video_of(lines: Path) -> Path:
    found = sorted(path for path in lines.parent.iterdir() if path.stem == lines.stem and path != lines)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UsageError(f"{lines} needs exactly one video called {lines.stem}.*, found {names}")
    return found[0]


def _read_video(lines: Path, video: Path, options: ImportOptions) -> Episode:
    codec = ActionCodec(slots=(ChoiceSlot(field="action", names=options.actions, first=0),))
    actions = read_actions(lines, codec)[:, 0].astype(np.uint8)
    frames = read_frames(video, options.size, resize=True)
    if len(frames) != len(actions):
        raise UsageError(
            f"{lines} has {len(actions)} actions but its video {len(frames)} frames; give one a frame"
        )
    return Episode(frames, actions)
