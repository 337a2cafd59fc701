"""Recording episodes of a world: one compressed shard per episode, each a function of its seed alone."""

from __future__ import annotations

import json
import multiprocessing
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.files import atomic_file
from diagd.errors import UsageError
from diagd.world.simulator import ACTIONS, Simulator

RECIPE = "recording.json"

_MOVES, _INTERACTIONS = (1, 2, 3, 4), (5, 0, 6, 7)
_INTERACTION_SHARES = (0.6, 0.2, 0.1, 0.1)


@dataclass(frozen=True)
class CollectOptions:
    """What `diagd world collect` records.

    Attributes:
        output: folder of the shards; shards already there are kept.
        episodes: how many episodes; each is one shard and one freshly generated world.
        steps: longest episode, in frames.
        seed: first seed; episode n plays in world `seed + n`, so sets that must not overlap need
            seeds at least `episodes` apart.
        move_share: share of decisions that start a walk of 1 to 8 steps; the others interact.
        processes: worlds simulated at a time.
    """

    output: Path
    episodes: int = 720
    steps: int = 200
    seed: int = 0
    move_share: float = 0.72
    processes: int = 2

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.steps < 2 or self.processes < 1:
            raise UsageError(
                f"episodes {self.episodes}, steps {self.steps}, processes {self.processes}: "
                "expected at least 1, 2 and 1"
            )


@dataclass(frozen=True)
class Episode:
    """Frames of one episode and the actions that caused them.

    Attributes:
        frames: uint8 [T, H, W, 3] RGB.
        actions: uint8 [T]; `actions[t]` led to `frames[t]` (the first is a noop).
    """

    frames: NDArray[np.uint8]
    actions: NDArray[np.uint8]


def play_episode(options: CollectOptions, index: int) -> Episode:
    """Play episode `index` with the random policy of `options`."""
    simulator = Simulator(options.seed + index)
    policy = random_policy(np.random.default_rng((options.seed, index)), options.move_share)
    frames, actions = [simulator.reset().frame], [0]
    while len(frames) < options.steps:
        action = next(policy)
        observation = simulator.step(action)
        frames.append(observation.frame)
        actions.append(action)
        if observation.over:
            break
    return Episode(np.stack(frames), np.asarray(actions, np.uint8))


def collect(options: CollectOptions) -> Iterator[Path]:
    """Record the episodes that `options.output` lacks, yielding each shard as it is written.

    Raises:
        UsageError: the folder holds shards recorded with other options.
    """
    check_recipe(
        options.output,
        {
            "seed": options.seed,
            "steps": options.steps,
            "move_share": options.move_share,
            "actions": list(ACTIONS),
        },
    )
    missing = [n for n in range(options.episodes) if not shard_path(options.output, n).exists()]
    record = partial(_record, options)
    if options.processes == 1:
        yield from map(record, missing)
        return
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        yield from pool.imap_unordered(record, missing)


def shard_path(folder: Path, index: int) -> Path:
    """Where episode `index` lies in `folder`."""
    return folder / f"episode-{index:06d}.npz"


def load_episode(path: Path) -> Episode:
    """Read one shard.

    Raises:
        UsageError: not a shard, or its frames and actions differ in number.
    """
    try:
        with np.load(path, allow_pickle=False) as shard:
            episode = Episode(shard["frames"], shard["actions"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not an episode shard: {error}; delete it and collect again") from error
    if len(episode.frames) != len(episode.actions):
        raise UsageError(f"{path}: {len(episode.frames)} frames but {len(episode.actions)} actions")
    return episode


def save_episode(path: Path, episode: Episode) -> None:
    """Write one shard."""
    with atomic_file(path) as partial:
        np.savez_compressed(partial, frames=episode.frames, actions=episode.actions)


def _record(options: CollectOptions, index: int) -> Path:
    path = shard_path(options.output, index)
    save_episode(path, play_episode(options, index))
    return path


def random_policy(random: np.random.Generator, move_share: float) -> Iterator[int]:
    """Endless actions: walks of 1 to 8 steps with probability ``move_share``, else 1 to 3 interactions."""
    while True:
        if random.random() < move_share:
            action, held = int(random.choice(_MOVES)), int(random.integers(1, 9))
        else:
            action = int(random.choice(_INTERACTIONS, p=_INTERACTION_SHARES))
            held = int(random.integers(1, 4))
        yield from [action] * held


def check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Note how a folder's episodes are made, names of the actions included.

    Raises:
        UsageError: it holds episodes made otherwise.
    """
    text, path = json.dumps(recipe, indent=1), folder / RECIPE
    if not path.exists():
        with atomic_file(path) as partial:
            partial.write_text(text)
    elif path.read_text() != text:
        raise UsageError(f"{folder} was recorded with {path.read_text()}; use another folder")


def recorded_actions(folder: Path) -> tuple[str, ...]:
    """Names of the actions of a folder of episodes.

    Raises:
        UsageError: the folder says nothing of them.
    """
    try:
        names = json.loads((folder / RECIPE).read_text())["actions"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{folder} has no readable {RECIPE}: {error}; record episodes with: diagd world collect {folder}"
        ) from error
    return tuple(names)
