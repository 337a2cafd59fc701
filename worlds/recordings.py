"""Recorded episodes as they are written, and how they were made; ``diagd.tuning.recordings`` reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from diagd.bundle.files import atomic_file, write_text
from diagd.errors import UsageError
from diagd.runtime.arrays import read_arrays
from diagd.tuning.recordings import SHARD, Episode, episode_paths

RECIPE = "recording.json"


def shard_path(folder: Path, index: int) -> Path:
    """Where episode `index` lies in `folder`."""
    return folder / f"episode-{index:06d}.npz"


def episode_sources(folder: Path) -> set[str]:
    """What the episodes of a folder were made of; see ``Episode``."""
    found = (read_arrays(path, ("source",), SHARD) for path in folder.glob("episode-*.npz"))
    sources = {str(arrays["source"]) for arrays in found if "source" in arrays}
    return sources - {""}


def save_episode(path: Path, episode: Episode) -> None:
    """Write one shard."""
    with atomic_file(path) as partial:
        np.savez_compressed(
            partial, frames=episode.frames, actions=episode.actions, source=np.array(episode.source)
        )


def check_recipe(folder: Path, recipe: dict[str, Any], *, note: bool = True) -> None:
    """Note how a folder's episodes are made, names of the actions included; or only look.

    Raises:
        UsageError: it holds episodes made otherwise.
    """
    text, path = json.dumps(recipe, indent=1), folder / RECIPE
    if not path.exists():
        if note:
            write_text(path, text)
    elif (before := path.read_bytes()) != text.encode():
        raise UsageError(
            f"{folder} was recorded with {before.decode(errors='backslashreplace')}; use another folder"
        )


def recorded_actions(folder: Path) -> tuple[str, ...]:
    """Names of the actions of a folder of episodes.

    Raises:
        UsageError: the folder says nothing of them, or an episode has one that has no name.
    """
    paths = episode_paths(folder)
    try:
        names = json.loads((folder / RECIPE).read_bytes())["actions"]
        if not names or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its actions are no list of names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{folder} has no readable {RECIPE}: {error}; record with: diagd world collect {folder}; "
            f'or name actions 0, 1, ... of episodes of your own: {{"actions": ["stay", "left"]}}'
        ) from error
    for path in paths:
        actions = read_arrays(path, ("actions",), SHARD).get("actions")
        if actions is not None and actions.dtype.kind in "iu" and actions.max(initial=0) >= len(names):
            raise UsageError(
                f"{path} has an action {actions.max()}; {folder / RECIPE} names {len(names)}, from 0 on: "
                "name all of them"
            )
    return tuple(names)
