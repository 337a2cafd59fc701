"""Folders of videos against what they should show: no model, only files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from diagd.cluster import ClusterOptions, open_workers
from diagd.engines.engine import Int
from diagd.errors import UsageError
from diagd.runtime.arrays import read_arrays
from diagd.runtime.clip import CLIPS
from diagd.runtime.pictures import files_in, read_frames, sized
from diagd.runtime.video import SUFFIXES
from worlds.inverse_dynamics import ActionReader, action_figures, done_in
from worlds.metrics import Estimate, MetricNetwork, frechet_distance, psnr, ssim
from worlds.options import FolderOptions

Number = TypeVar("Number", bound=np.generic)
Pictures = NDArray[np.uint8]
KINDS = tuple(dict.fromkeys((*SUFFIXES, *CLIPS)))
"""Files that hold a video."""


@dataclass(frozen=True)
class Judged:
    """What was found in one video.

    Attributes:
        scores: by figure, the mean over its pictures.
        features: float64 [n, D] of the video and of its recording, by network.
        actions: ids int32 [n, 11] that a network of inverse dynamics saw, and those that were done.
    """

    scores: dict[str, float]
    features: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    actions: tuple[Int, Int] | None


class VideoJudge:
    """A worker: judges a video, the first of two files, by the recording of what it should show."""

    def __init__(self, options: FolderOptions, networks: Sequence[Path], threads: int) -> None:
        self._options = options
        self._networks = {path.stem: MetricNetwork(path, threads) for path in networks}
        self._inverse = ActionReader(options.dynamics, threads) if options.dynamics else None

    def __call__(self, files: tuple[Path, Path]) -> Judged:
        """As long as the shorter of both.

        Raises:
            UsageError: a file cannot be read, is too short, or has pictures of another size.
        """
        made, truth = _read_pair(*files, self._options)
        scores = {"psnr": float(psnr(made, truth).mean()), "ssim": float(ssim(made, truth).mean())}
        features, actions, clips = {}, None, (made[None], truth[None])
        for name, network in self._networks.items():
            if network.takes_pairs:
                scores[name] = float(network.distances(*clips).mean())
            else:
                features[name] = network.features(clips[0]), network.features(clips[1])
        if self._inverse is not None:
            actions = self._inverse.read(made, done_in(files[1], len(made), self._options))
        return Judged(scores, features, actions)


def videos_in(folder: Path) -> dict[str, Path]:
    """The videos of a folder, by name without suffix."""
    return {path.stem: path for path in files_in(folder, KINDS)}


def pairs_in(made: Path, truth: Path, most: int) -> list[tuple[Path, Path]]:
    """Files of two folders that have the same name, so many at most.

    Raises:
        UsageError: none have.
    """
    one, other = videos_in(made), videos_in(truth)
    pairs = [(path, other[name]) for name, path in one.items() if name in other][:most]
    if not pairs:
        raise UsageError(
            f"no video of {made} ({len(one)}) has the name of one of {truth} ({len(other)}); a video is "
            "judged by the recording of its name"
        )
    return pairs


def _read_pair(made: Path, truth: Path, options: FolderOptions) -> tuple[Pictures, Pictures]:
    behind = options.skip if options.truth_skip is None else options.truth_skip
    shown = read_video(made, None, options.resize)[options.skip :]
    true = read_video(truth, shown.shape[1:3], options.resize)[behind:]
    count = min(len(shown), len(true))
    if not count:
        raise UsageError(f"{made} or {truth} is too short: lower --set skip or truth_skip")
    return shown[:count], true[:count]


def read_video(path: Path, size: tuple[int, ...] | None, resize: bool) -> Pictures:
    """Pictures uint8 [T, H, W, 3] of a video or of an episode, one that was dreamt included."""
    shape = None if size is None else (size[0], size[1])
    if path.suffix.lower() != ".npz":
        return read_frames(path, shape, resize=resize)
    found = read_arrays(path, ("images", "raw_context", "dreamt_images"), "episode")
    parts = [found[name] for name in ("images", "raw_context", "dreamt_images") if name in found]
    wrong = [part for part in parts if part.dtype != np.uint8 or part.ndim != 4 or part.shape[1] != 3]
    if not parts or wrong:
        raise UsageError(f"{path} is no episode: expected images uint8 [T, 3, height, width]")
    pictures = np.concatenate(parts).transpose(0, 2, 3, 1)
    own = (pictures.shape[1], pictures.shape[2])
    return sized(pictures, path, shape or own, resize=resize, cover=False)


def compare_folders(
    made: Path,
    truth: Path,
    options: FolderOptions,
    networks: Sequence[Path],
    report: Callable[[str], None],
    who: ClusterOptions | None = None,
    threads: int = 0,
) -> dict[str, Estimate]:
    """PSNR, SSIM and what networks say, over the videos of two folders.

    ``report`` hears the name of each video that was judged, ``who`` does it, with so many threads each.

    Returns:
        By figure: the mean over videos; Frechet distances of features have no error.
    """
    pairs = pairs_in(made, truth, options.videos)
    judge = partial(VideoJudge, options, tuple(networks), threads)
    judged: dict[int, Judged] = {}
    with open_workers(judge, who or ClusterOptions()) as workers:
        for number, one in workers.map(pairs):
            report(pairs[number][0].stem)
            judged[number] = one
    found = [judged[number] for number in range(len(pairs))]
    figures = {name: Estimate.of(np.array([one.scores[name] for one in found])) for name in found[0].scores}
    for name in found[0].features:
        ours, theirs = _joined([one.features[name] for one in found])
        figures[f"{name} frechet"] = Estimate(frechet_distance(ours, theirs), float("nan"), len(found))
    actions = [one.actions for one in found if one.actions is not None]
    return figures | (action_figures(*_joined(actions)) if actions else {})


def _joined(
    pairs: Sequence[tuple[NDArray[Number], NDArray[Number]]],
) -> tuple[NDArray[Number], NDArray[Number]]:
    first, second = zip(*pairs, strict=True)
    return np.concatenate(first), np.concatenate(second)
