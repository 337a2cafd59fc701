"""Episodes as token streams, and seeded windows of them to train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diagd.errors import UsageError
from diagd.world.codebook import cut_patches, nearest_codes
from diagd.world.collect import Episode, load_episode


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
