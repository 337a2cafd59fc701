"""Hooks for the user's own metric networks: features for a Frechet distance, and learned distances.

No network is shipped. Any ONNX file will do whose inputs are float32 pictures in 0..1: one input
[N, 3, H, W] -> [N, D] gives features of frames (FID), one input [N, 3, T, H, W] -> [N, D] features of clips
(FVD), two inputs [N, 3, H, W] -> [N, ...] the distance of two frames (LPIPS).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diagd.errors import UsageError, require

_BATCH = 16


class MetricNetwork:
    """An ONNX file run on the CPU.

    Raises:
        UsageError: the file cannot be loaded, or its inputs are of another kind.
    """

    def __init__(self, path: Path) -> None:
        runtime = require("onnxruntime", extra="export", purpose="run a metric network")
        if not path.is_file():
            raise UsageError(f"no such network: {path}; give the path of an ONNX file")
        try:
            self._session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UsageError(f"{path} cannot be loaded as an ONNX network: {error}") from error
        inputs = self._session.get_inputs()
        self._names = [value.name for value in inputs]
        ranks = [len(value.shape) for value in inputs]
        if ranks not in ([4], [5], [4, 4]):
            raise UsageError(
                f"{path} has inputs of rank {ranks}; expected [N, 3, H, W] or [N, 3, T, H, W], "
                "or two of the first"
            )
        self.takes_clips, self.takes_pairs = ranks == [5], len(ranks) == 2

    def features(self, clips: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Features [n, D] of clips uint8 [B, T, H, W, 3]: n = B for a network of clips, else B * T."""
        pictures = _channels_first(clips) if self.takes_clips else _channels_first(_flat(clips))
        outputs = self._run(pictures)
        return outputs.reshape(len(outputs), -1)

    def distances(self, clips: NDArray[np.uint8], truth: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Distances [B, T] of the frames of two sets of clips uint8 [B, T, H, W, 3]."""
        outputs = self._run(_channels_first(_flat(clips)), _channels_first(_flat(truth)))
        distances: NDArray[np.float64] = outputs.reshape(*clips.shape[:2], -1).mean(-1)
        return distances

    def _run(self, *pictures: NDArray[np.float32]) -> NDArray[np.float64]:
        parts = []
        for start in range(0, len(pictures[0]), _BATCH):
            feed = (picture[start : start + _BATCH] for picture in pictures)
            parts.append(self._session.run(None, dict(zip(self._names, feed, strict=True)))[0])
        return np.concatenate(parts).astype(np.float64)


def _flat(clips: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return clips.reshape(-1, *clips.shape[2:])


def _channels_first(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = np.moveaxis(pictures, -1, 1).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(scaled)
