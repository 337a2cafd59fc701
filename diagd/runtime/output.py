"""Where frames go: to a video, or to a file of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np

from diagd.bundle.files import atomic_file
from diagd.bundle.manifest import MediaMark
from diagd.engines.engine import Int
from diagd.runtime.pixels import Pixels
from diagd.runtime.video import SUFFIXES, VideoWriter

TOKENS = ".npy"
OUTPUTS = (*SUFFIXES, TOKENS)
"""Kinds of files of frames."""


def write_tokens(path: Path, frames: Iterable[Int]) -> None:
    """Write int32 [T, rows, columns] as .npy; nothing is left of a failed run."""
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.save(file, np.stack(list(frames)))


def write_video(
    path: Path,
    pictures: Iterable[Pixels],
    fps: float,
    mark: MediaMark | None,
    truth: Pixels | None = None,
    behind: int = 0,
) -> float | None:
    """Write pictures uint8 [height, width, 3] as .mp4 or .gif; nothing is left of a failed run.

    Args:
        path: of the video.
        pictures: in order.
        fps: pictures a second.
        mark: that they must carry.
        truth: uint8 [T, height, width, 3], what pictures should be.
        behind: from which picture on.

    Returns:
        PSNR of the pictures to the truth, dB; None without truth.
    """
    errors, images = [], iter(pictures)
    first = next(images)
    with VideoWriter(path, fps, (first.shape[0], first.shape[1]), mark) as writer:
        for number, image in enumerate(chain([first], images)):
            writer.write(image)
            if truth is not None and behind <= number < behind + len(truth):
                errors.append(squared_error(image, truth[number - behind]))
    return psnr(errors)


def squared_error(image: Pixels, true: Pixels) -> float:
    """Mean squared difference of two pictures."""
    return float(np.mean(np.square(image.astype(np.float32) - true.astype(np.float32))))


def psnr(errors: list[float]) -> float | None:
    """Peak signal to noise, dB, of mean squared errors of 8-bit pictures; None of none."""
    if not errors:
        return None
    mean = sum(errors) / len(errors)
    return math.inf if mean == 0 else 10 * math.log10(255**2 / mean)
