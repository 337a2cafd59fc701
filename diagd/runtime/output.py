"""Where generated frames go: a video through the tokenizer, or tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diagd.bundle.files import atomic_file
from diagd.bundle.targets import file_target
from diagd.engines.engine import Int
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.video import VideoWriter

TOKENS = ".npy"
VIDEOS = (".mp4", ".gif")


def check_output(path: Path) -> None:
    """Refuse an output that could not be written, before any work is done.

    Raises:
        UsageError: unknown kind of file, something else is there, or the directory is missing or read-only.
    """
    file_target(path, (*VIDEOS, TOKENS))


def write_tokens(path: Path, frames: Iterator[Int]) -> None:
    """Write int32 [T, rows, columns] as .npy; nothing is left of a failed run."""
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.save(file, np.stack(list(frames)))


def write_video(path: Path, prompt: Int, frames: Iterator[Int], pixels: PixelCodec, fps: float) -> None:
    """Write the prompt and the generated frames as .mp4 or .gif; nothing is left of a failed run."""
    size = (pixels.spec.height, pixels.spec.width)

    def tokens() -> Iterator[Int]:
        yield from prompt
        yield from frames

    with VideoWriter(path, fps, size) as writer:
        for image in pixels.decode(tokens()):
            writer.write(image)
