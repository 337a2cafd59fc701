"""Where generated frames go: a video through the tokenizer, or tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diagd.bundle.files import atomic_file
from diagd.engines.engine import Int
from diagd.errors import UsageError
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.video import VideoWriter

TOKENS = ".npy"
VIDEOS = (".mp4", ".gif")


def check_output(path: Path) -> None:
    """Refuse an output that could not be written, before any work is done.

    Raises:
        UsageError: unknown kind of file, or the directory does not exist.
    """
    if path.suffix not in (*VIDEOS, TOKENS):
        raise UsageError(f"--output {path}: expected a name ending in .mp4, .gif or .npy")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--output {path}: the directory {path.parent} does not exist; make it first")


def write_tokens(path: Path, frames: Iterator[Int]) -> None:
    """Write int32 [T, rows, columns] as .npy; nothing is left of a failed run."""
    with atomic_file(path) as partial:
        np.save(partial, np.stack(list(frames)))


def write_video(path: Path, prompt: Int, frames: Iterator[Int], pixels: PixelCodec, fps: float) -> None:
    """Write the prompt and the generated frames as .mp4 or .gif; nothing is left of a failed run."""
    size = (pixels.spec.height, pixels.spec.width)

    def tokens() -> Iterator[Int]:
        yield from prompt
        yield from frames

    with VideoWriter(path, fps, size) as writer:
        for image in pixels.decode(tokens()):
            writer.write(image)
