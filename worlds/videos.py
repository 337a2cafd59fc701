"""Folders of videos against what they should show: no model, only files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diagd.errors import UsageError
from diagd.runtime.arrays import read_arrays
from diagd.runtime.clip import CLIPS
from diagd.runtime.pictures import files_in, read_frames, sized
from diagd.runtime.video import SUFFIXES
from worlds.inverse_dynamics import ActionReader, done_in
from worlds.metrics import Estimate, MetricNetwork, frechet_distance, psnr, ssim
from worlds.options import FolderOptions

Pictures = NDArray[np.uint8]
KINDS = tuple(dict.fromkeys((*SUFFIXES, *CLIPS)))
"""Files that hold a video."""


@dataclass(frozen=True)
class VideoPair:
    """A video that was made, and the recording of what it should show, uint8 [T, H, W, 3] both."""

    name: str
    made: Pictures
    truth: Pictures
    recording: Path


def videos_in(folder: Path) -> dict[str, Path]:
    """The videos of a folder, by name without suffix."""
    return {path.stem: path for path in files_in(folder, KINDS)}


def read_pairs(made: Path, truth: Path, options: FolderOptions) -> Iterator[VideoPair]:
    """The videos of two folders that have the same name, as long as the shorter of both.

    Raises:
        UsageError: none have, or a file cannot be read or has pictures of another size.
    """
    one, other = videos_in(made), videos_in(truth)
    names = [name for name in one if name in other][: options.videos]
    if not names:
        raise UsageError(
            f"no video of {made} ({len(one)}) has the name of one of {truth} ({len(other)}); a video is "
            "judged by the recording of its name"
        )
    behind = options.skip if options.truth_skip is None else options.truth_skip
    for name in names:
        shown = read_video(one[name], None, options.resize)[options.skip :]
        true = read_video(other[name], shown.shape[1:3], options.resize)[behind:]
        count = min(len(shown), len(true))
        if not count:
            raise UsageError(f"{one[name]} or {other[name]} is too short: lower --set skip or truth_skip")
        yield VideoPair(name, shown[:count], true[:count], other[name])


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
    made: Path, truth: Path, options: FolderOptions, networks: Sequence[Path], report: Callable[[str], None]
) -> dict[str, Estimate]:
    """PSNR, SSIM and what networks say, over the videos of two folders.

    Returns:
        By figure: the mean over videos; Frechet distances of features have no error.
    """
    judges = [(path.stem, MetricNetwork(path)) for path in networks]
    inverse = ActionReader(options.dynamics) if options.dynamics else None
    scores: dict[str, list[float]] = {"psnr": [], "ssim": []}
    features: dict[str, tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]] = {}
    for pair in read_pairs(made, truth, options):
        report(pair.name)
        scores["psnr"].append(float(psnr(pair.made, pair.truth).mean()))
        scores["ssim"].append(float(ssim(pair.made, pair.truth).mean()))
        for name, judge in judges:
            clips = pair.made[None], pair.truth[None]
            if judge.takes_pairs:
                scores.setdefault(name, []).append(float(judge.distances(*clips).mean()))
                continue
            for kept, clip in zip(features.setdefault(name, ([], [])), clips, strict=True):
                kept.append(judge.features(clip))
        if inverse is not None:
            inverse.add(pair.made, done_in(pair.recording, len(pair.made), options))
    figures = {name: Estimate.of(np.array(values)) for name, values in scores.items()}
    for name, (ours, theirs) in features.items():
        distance = frechet_distance(np.concatenate(ours), np.concatenate(theirs))
        figures[f"{name} frechet"] = Estimate(distance, float("nan"), len(ours))
    return figures | (inverse.table() if inverse is not None else {})
