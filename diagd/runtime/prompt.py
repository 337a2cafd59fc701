"""Prompts from files: images, videos or token arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Manifest
from diagd.engines.engine import Int
from diagd.errors import UsageError
from diagd.runtime.arrays import read_array
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.video import read_frames


def read_prompt(path: Path, pixels: PixelCodec, frames: int, resize: bool) -> Int:
    """Tokens int32 [P, rows, columns] of the last ``frames`` frames of an image or video.

    Raises:
        UsageError: the file cannot be read, is of another size or too short.
    """
    size = (pixels.spec.height, pixels.spec.width)
    seen = read_frames(path, size, frames=frames, resize=resize, cover=pixels.spec.cover)
    if len(seen) < frames:
        raise UsageError(f"{path} has {len(seen)} frames, {frames} are asked for; lower prompt_frames")
    return pixels.encode(seen)


def read_tokens(path: Path, manifest: Manifest) -> Int:
    """Tokens int32 [P, rows, columns] from a .npy file.

    Raises:
        UsageError: the file cannot be read, or holds ids that are no visual tokens of the model.
    """
    tokens = read_array(path, "tokens")
    if tokens.dtype.kind not in "iu":
        raise UsageError(f"{path} holds {tokens.dtype}; expected whole numbers, tokens [P, rows, columns]")
    check_tokens(tokens, manifest, str(path))
    return np.ascontiguousarray(tokens, dtype=np.int32)


def check_tokens(tokens: NDArray[np.generic], manifest: Manifest, source: str) -> None:
    """Refuse ids that are no visual tokens of the model, which its tokenizer cannot show.

    Raises:
        UsageError: there is one; the message begins with ``source``.
    """
    high = max(rule.high for rule in manifest.sampling.ranges)
    if not tokens.size or tokens.min() < 0 or tokens.max() >= high:
        span = f"{tokens.min()}..{tokens.max()}" if tokens.size else "none"
        raise UsageError(f"{source} holds tokens {span}; {manifest.name} has visual tokens 0..{high - 1}")
