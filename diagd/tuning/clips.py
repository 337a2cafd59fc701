"""Clips of a released family, videos with their actions or episodes, as windows to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Manifest
from diagd.errors import UsageError
from diagd.runtime.actions import encode
from diagd.runtime.clip import Clip, read_recording
from diagd.runtime.generate import CLIPS
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.video import files_in
from diagd.tuning.align_checkpoint import cut


def read_clips(
    folder: Path, manifest: Manifest, pixels: PixelCodec, frames: int, *, resize: bool = False
) -> NDArray[np.int64]:
    """Windows int64 [N, tokens of ``frames`` frames] of all clips of a folder, half a window apart.

    Args:
        folder: of videos, each with the actions of its name in a .jsonl where the model takes some, or of
            episodes.
        manifest: of the bundle that encodes them.
        pixels: its tokenizer.
        frames: of a window.
        resize: scale pictures of another size.

    Raises:
        UsageError: a clip cannot be read, or none is as long as a window.
    """
    windows = []
    for path in files_in(folder, CLIPS):
        clip = read_recording(path, manifest, pixels, resize=resize)
        if len(clip.tokens) >= frames:
            windows.append(cut(stream_of(clip, manifest), manifest.layout, frames))
    if not windows:
        raise UsageError(f"{folder} has no clip of {frames} frames; give longer ones, or lower --set frames")
    return np.concatenate(windows)


def stream_of(clip: Clip, manifest: Manifest) -> NDArray[np.int64]:
    """The tokens int64 [T] of a clip in the order of the stream, without the prefix.

    Behind the last frame, where an action would stand that nobody knows, is the no-op: nothing follows it.
    """
    cells = clip.tokens.reshape(len(clip.tokens), -1).astype(np.int64)
    layout = manifest.layout
    if manifest.actions is None or clip.led is None:
        return cells.reshape(-1)
    led = np.concatenate([clip.led, encode(manifest.actions, {})[None]]).astype(np.int64)
    before, after = led[:-1, layout.gap - layout.before :], led[1:, : layout.after]
    return np.concatenate([before, cells, after], axis=1).reshape(-1)
