"""The compiled schedule: which token is fed where, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int32]

NO_SINK = -1


@dataclass(frozen=True)
class Step:
    """One forward pass: the tokens it feeds, in slot order; all arrays int32 [width]."""

    sources: Int
    positions: Int
    sinks: Int

    @property
    def width(self) -> int:
        """Number of fed tokens."""
        return len(self.positions)


@dataclass(frozen=True)
class Table:
    """Steps of a run of frames as flat int32 arrays; row r of step n is in offsets[n]:offsets[n+1].

    Attributes:
        offsets: int32 [steps + 1].
        sources: int32 [rows], position of the token whose id is fed. It differs from ``positions`` only
            for row seeds.
        positions: int32 [rows], raster position at which it is fed.
        sinks: int32 [rows], position of the cell its prediction fills, or ``NO_SINK``.
        frame_starts: int32 [frames], step that decodes cell (0, 0) of each frame.
        frame_ends: int32 [frames], step after which a frame is complete.
        first_frame: index in the stream of the first of these frames.
    """

    offsets: Int
    sources: Int
    positions: Int
    sinks: Int
    frame_starts: Int
    frame_ends: Int
    first_frame: int

    @property
    def steps(self) -> int:
        """Number of forward passes, chunks of the prompt included."""
        return len(self.offsets) - 1

    @property
    def widths(self) -> Int:
        """int32 [steps], tokens fed by each step."""
        return np.diff(self.offsets)

    def step(self, index: int) -> Step:
        """Views of one step."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Step(self.sources[rows], self.positions[rows], self.sinks[rows])
