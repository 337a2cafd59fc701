"""Recorded episodes of a world: their files, their tokens, and windows of them to train on."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.files import atomic_file
from diagd.errors import UsageError

RECIPE = "recording.json"

Patches = NDArray[np.uint8]
"""uint8 [n, p * p * 3]."""


@dataclass(frozen=True)
class Episode:
    """Frames of one episode and the actions that caused them.

    Attributes:
        frames: uint8 [T, H, W, 3] RGB.
        actions: uint8 [T]; `actions[t]` led to `frames[t]` (the first is a noop).
    """

    frames: NDArray[np.uint8]
    actions: NDArray[np.uint8]


@dataclass(frozen=True)
class TokenDataset:
    """Tokenised episodes, one after the other, a known action token ahead of the cells of each frame.

    Attributes:
        streams: int16 [F, 1 + h * w], one row a frame.
        starts: int64 [E + 1], first row of each episode, and the end.
    """

    streams: NDArray[np.int16]
    starts: NDArray[np.int64]

    @property
    def frames(self) -> int:
        """Frames of all episodes."""
        return len(self.streams)

    def window_starts(self, frames: int) -> NDArray[np.int64]:
        """Rows from which ``frames`` frames follow inside one episode.

        Raises:
            UsageError: every episode is shorter.
        """
        spans = [np.arange(a, b - frames + 1) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]
        starts = np.concatenate(spans) if spans else np.zeros(0, np.int64)
        if not len(starts):
            raise UsageError(
                f"no episode has {frames} frames; collect longer episodes or train on fewer frames"
            )
        return starts.astype(np.int64)

    def windows(self, starts: NDArray[np.int64], frames: int) -> NDArray[np.int64]:
        """Token streams int64 [B, frames * (1 + h * w)] of the windows that begin at ``starts`` [B]."""
        rows = starts[:, None] + np.arange(frames)
        windows: NDArray[np.int64] = self.streams[rows].reshape(len(starts), -1).astype(np.int64)
        return windows


def episode_paths(folder: Path) -> list[Path]:
    """Shards of a folder in order.

    Raises:
        UsageError: there is none.
    """
    paths = sorted(folder.glob("episode-*.npz"))
    if not paths:
        raise UsageError(f"{folder} holds no episode-*.npz; record some with: diagd world collect {folder}")
    return paths


def episodes(folder: Path) -> Iterator[Episode]:
    """Read the shards of a folder one at a time."""
    return map(load_episode, episode_paths(folder))


def tokenise(recording: Iterator[Episode] | Sequence[Episode], codebook: NDArray[np.uint8]) -> TokenDataset:
    """Encode episodes with ``codebook`` uint8 [codes, p, p, 3]; action a becomes id ``codes + a``."""
    codes, side = codebook.shape[:2]
    streams, starts = [], [0]
    for episode in recording:
        tokens = nearest_codes(cut_patches(episode.frames, side), codebook.reshape(codes, -1))
        cells = tokens.reshape(len(episode.frames), -1)
        streams.append(np.concatenate([codes + episode.actions[:, None].astype(np.int16), cells], axis=1))
        starts.append(starts[-1] + len(cells))
    return TokenDataset(np.concatenate(streams).astype(np.int16), np.asarray(starts))


def cached_tokens(folder: Path, codebook: NDArray[np.uint8]) -> TokenDataset:
    """Encode a folder once and keep the result beside its shards.

    The cache is rebuilt when shards were added or the codebook differs.
    """
    path, count = folder / "tokens.npz", len(episode_paths(folder))
    if path.exists():
        with np.load(path, allow_pickle=False) as cache:
            if len(cache["starts"]) == count + 1 and np.array_equal(cache["codebook"], codebook):
                return TokenDataset(cache["streams"], cache["starts"])
    dataset = tokenise(episodes(folder), codebook)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, streams=dataset.streams, starts=dataset.starts, codebook=codebook)
    temporary.rename(path)
    return dataset


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


def cut_patches(frames: NDArray[np.uint8], side: int) -> Patches:
    """Cut uint8 [T, H, W, 3] into uint8 [T * H/side * W/side, side * side * 3], in raster order.

    Raises:
        UsageError: the frame size is no multiple of ``side``.
    """
    count, height, width, _ = frames.shape
    if height % side or width % side:
        raise UsageError(
            f"frames of {height}x{width} pixels cannot be cut into {side}x{side} patches; resize them"
        )
    grid = frames.reshape(count, height // side, side, width // side, side, 3)
    return np.ascontiguousarray(grid.transpose(0, 1, 3, 2, 4, 5)).reshape(-1, side * side * 3)


def nearest_codes(patches: Patches, codes: Patches) -> NDArray[np.int64]:
    """Ids [n] of the codes [codes, ...] nearest to each patch; ties go to the lowest id."""
    distinct, inverse = index_distinct(patches)
    nearest, _ = assign(patches[distinct].astype(np.float32), codes.astype(np.float32))
    return nearest[inverse]


def index_distinct(patches: Patches) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row of the first of each distinct patch, and for every patch which distinct one it is."""
    keys = np.ascontiguousarray(patches).view(np.dtype((np.void, patches.shape[1]))).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first, inverse


def assign(
    points: NDArray[np.float32], centres: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Nearest centre of each point, and the squared distance to it."""
    norms = (centres**2).sum(1)
    nearest, distance = [], []
    for chunk in np.array_split(points, max(1, len(points) // 8192)):
        scores = norms - 2 * chunk @ centres.T
        nearest.append(scores.argmin(1))
        distance.append(scores.min(1) + (chunk**2).sum(1))
    return np.concatenate(nearest), np.concatenate(distance)
