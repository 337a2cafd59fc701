"""Recorded episodes of a world: their files as they are read, their tokens, and windows to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, cache
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.export.tokenizers.base import TokenizerGraphs, loaded
from diagd.runtime.arrays import read_arrays
from diagd.runtime.pixels import PixelCodec

if TYPE_CHECKING:
    import torch

TOKENS = "tokens.npz"
SHARD = "episode of a recording"

_CHUNK = 64
"""Frames encoded at once."""


@dataclass(frozen=True)
class Episode:
    """Frames of one episode and the actions that caused them.

    Attributes:
        frames: uint8 [T, H, W, 3] RGB.
        actions: uint8 [T]; `actions[t]` led to `frames[t]` (the first is a noop).
        source: digest of the video and lines it was made of; none for episodes that were played.
    """

    frames: NDArray[np.uint8]
    actions: NDArray[np.uint8]
    source: str = ""


@dataclass(frozen=True)
class FrameEncoder:
    """How the frames of a recording become tokens.

    Attributes:
        encode: frames uint8 [T, H, W, 3] to ids int [T, rows, columns].
        codes: number of ids; action a of a recording is the token ``codes + a``.
        digest: of what decides the ids; tokens are kept under it.
    """

    encode: Callable[[NDArray[np.uint8]], NDArray[np.integer]]
    codes: int
    digest: str

    @classmethod
    def of_graphs(cls, graphs: TokenizerGraphs, tensors: Mapping[str, torch.Tensor]) -> FrameEncoder:
        """The encoder of a tokenizer with its tensors, by name."""
        import torch

        encoder = loaded(graphs.build("Encoder"), tensors)

        def encode(frames: NDArray[np.uint8]) -> NDArray[np.integer]:
            if frames.shape[1:3] != (graphs.height, graphs.width):
                raise UsageError(
                    f"frames of {frames.shape[1]}x{frames.shape[2]} pixels; the tokenizer reads "
                    f"{graphs.height}x{graphs.width}: resize them"
                )
            with torch.inference_mode():
                parts = [encoder(part) for part in torch.from_numpy(frames).split(_CHUNK)]
            return torch.cat(parts).numpy()

        named = b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
        return cls(encode, graphs.codes, hashlib.sha256(named).hexdigest())

    @classmethod
    def of_bundle(cls, bundle: Bundle, cpu: CpuOptions) -> FrameEncoder:
        """The bundle's own encoder graph; UsageError: it has none."""
        return cls(PixelCodec(bundle, cpu).encode, bundle.manifest.output_vocabulary, bundle.digest)


@dataclass(frozen=True)
class TokenDataset:
    """Tokenised episodes, one after the other, a known action token ahead of the cells of each frame.

    Attributes:
        streams: int32 [F, 1 + h * w], one row a frame.
        starts: int64 [E + 1], first row of each episode, and the end.
    """

    streams: NDArray[np.int32]
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
    """Shards of a folder in order; UsageError: there is none."""
    paths = sorted(folder.glob("episode-*.npz"))
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is no folder of recordings, clips or episodes, nor a .npy token stream; "
            "record a world with: diagd world collect recordings"
        )
    if not paths:
        raise UsageError(f"{folder} holds no episode-*.npz; record some with: diagd world collect {folder}")
    return paths


def episodes(folder: Path) -> Iterator[Episode]:
    """Read the shards of a folder one at a time."""
    return map(load_episode, episode_paths(folder))


def tokenise(
    recording: Iterable[Episode], encoder: FrameEncoder, report: Callable[[int], None] | None = None
) -> TokenDataset:
    """Encode episodes; action a becomes id ``encoder.codes + a``. ``report`` hears how many are encoded."""
    streams, starts = [], [0]
    for episode in recording:
        cells = encoder.encode(episode.frames).reshape(len(episode.frames), -1)
        actions = encoder.codes + episode.actions[:, None].astype(np.int32)
        streams.append(np.concatenate([actions, cells], axis=1, dtype=np.int32))
        starts.append(starts[-1] + len(cells))
        if report is not None:
            report(len(streams))
    return TokenDataset(np.concatenate(streams), np.asarray(starts))


def cached_tokens(
    folder: Path, encoder: FrameEncoder, report: Callable[[int], None] | None = None
) -> TokenDataset:
    """Encode a folder once and keep the result in the cache, under the digests of its shards and encoder.

    ``report`` hears how many episodes are encoded.
    """
    made: list[TokenDataset] = []

    def make(place: Path) -> None:
        made.append(tokenise(episodes(folder), encoder, report))
        np.savez(place / TOKENS, streams=made[0].streams, starts=made[0].starts)

    parts = [encoder.digest, *map(cache.digest, episode_paths(folder))]
    found = cache.entry("tokens", hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32], make)
    if made or found is None:
        return made[0] if made else tokenise(episodes(folder), encoder, report)
    with np.load(found / TOKENS, allow_pickle=False) as kept:
        return TokenDataset(kept["streams"], kept["starts"])


def load_episode(path: Path) -> Episode:
    """Read one shard; UsageError: not a shard, or its frames and actions differ in number."""
    found = read_arrays(path, ("frames", "actions"), SHARD)
    try:
        frames, actions = found["frames"], found["actions"]
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
            seen = f"{frames.dtype} {list(frames.shape)}"
            raise ValueError(f"frames are {seen}; expected uint8 [T, height, width, 3]")
        if actions.dtype != np.uint8 or actions.ndim != 1:
            raise ValueError(f"actions are {actions.dtype} {list(actions.shape)}; expected uint8 [T]")
    except (KeyError, ValueError) as error:
        raise UsageError(f"{path} is no {SHARD}: {error}; delete it and record again") from error
    if len(frames) != len(actions):
        raise UsageError(f"{path}: {len(frames)} frames but {len(actions)} actions")
    return Episode(frames.astype(np.uint8, copy=False), actions.astype(np.uint8, copy=False))
