"""Random weights for latency work without a checkpoint: any size, generated as they are read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.export.checkpoints.checkpoint import Checkpoint, Shape, TensorHandle

_PER_COUNTER = 16  # 16-bit draws in one 256-bit Philox block
_CHUNK = 1 << 20


def initial_moments(name: str, shape: Shape) -> tuple[float, float]:
    """Mean and standard deviation that keep activations finite and of order one.

    Matrices and convolutions have mean 0 and standard deviation ``1 / sqrt(fan_in)``, vectors named
    ``bias`` are 0, other vectors and scalars are gains of 1.
    """
    if len(shape) >= 2:
        return 0.0, 1.0 / math.sqrt(max(1, math.prod(shape[1:])))
    return 0.0 if name.endswith("bias") else 1.0, 0.0


class RandomCheckpoint(Checkpoint):
    """A checkpoint whose float32 tensors are a function of (seed, name, element index) alone.

    Order of reading, chunk sizes and the NumPy version make no difference: elements are uniform 16-bit
    draws of the counter-based generator Philox4x64-10 (Salmon et al., 2011), scaled to `initial_moments`.
    """

    def __init__(self, expected: Mapping[str, Shape], *, seed: int) -> None:
        tensors = {
            name: RandomTensor(
                tuple(shape), "float32", _key(seed, name), *initial_moments(name, tuple(shape))
            )
            for name, shape in expected.items()
        }
        super().__init__(tensors, source=f"random weights, seed {seed}")


@dataclass(frozen=True)
class RandomTensor(TensorHandle):
    """A tensor generated on reading from a 128-bit Philox key; memory is that of the rows read."""

    key: int
    mean: float
    deviation: float

    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        row = math.prod(self.shape[1:])
        values = np.full((stop - start) * row, self.mean, np.float32)
        if self.deviation:
            for first in range(start * row, stop * row, _CHUNK):
                last = min(first + _CHUNK, stop * row)
                values[first - start * row : last - start * row] += self._deviations(first, last)
        return values.reshape(stop - start, *self.shape[1:])

    def _deviations(self, start: int, stop: int) -> NDArray[np.float32]:
        counter, skipped = divmod(start, _PER_COUNTER)
        words = math.ceil((stop - start + skipped) / 4)
        raw = np.random.Philox(key=self.key, counter=counter).random_raw(words)
        draws = raw.astype("<u8", copy=False).view("<i2")[skipped : skipped + stop - start]
        # (integer + 1/2) / 2^15 is uniform on (-1, 1), symmetric, with standard deviation 1 / sqrt(3).
        scale = np.float32(self.deviation * math.sqrt(3.0) / 2**15)
        return (draws.astype(np.float32) + np.float32(0.5)) * scale


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
