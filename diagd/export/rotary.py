"""Rotary position tables as a function of the raster position."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from diagd.schedule import StreamLayout

Float = NDArray[np.float64]


class Axis(str, Enum):
    """Coordinate of a token that an angle is proportional to."""

    POSITION = "position"
    FRAME = "frame"
    ROW = "row"
    COLUMN = "column"


@dataclass(frozen=True)
class RotaryAxis:
    """Angles ``coordinate * frequency``, one frequency for each channel pair, in channel order."""

    axis: Axis
    frequencies: tuple[float, ...]


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding in rotate-half layout; the axes' pairs are concatenated to ``head_size / 2`` pairs."""

    axes: tuple[RotaryAxis, ...]

    @property
    def pairs(self) -> int:
        """Channel pairs, half the head size."""
        return sum(len(axis.frequencies) for axis in self.axes)

    def angles(self, layout: StreamLayout, positions: int) -> Float:
        """Angles of the first ``positions`` raster positions, float64 [positions, pairs], radians.

        Prefix tokens stand at angle 0 on the grid axes; known tokens of a frame at its first cell.
        """
        position = np.arange(positions)
        behind = np.maximum(position - layout.prefix, 0)
        cell = np.clip(behind % layout.frame_length - layout.before, 0, layout.cells - 1)
        coordinates = {
            Axis.POSITION: position,
            Axis.FRAME: behind // layout.frame_length,
            Axis.ROW: cell // layout.columns,
            Axis.COLUMN: cell % layout.columns,
        }
        known = behind % layout.frame_length - layout.before
        on_grid = (known >= 0) & (known < layout.cells) & (position >= layout.prefix)
        for axis in (Axis.ROW, Axis.COLUMN):
            coordinates[axis] = np.where(on_grid, coordinates[axis], 0)
        return np.concatenate([np.outer(coordinates[a.axis], a.frequencies) for a in self.axes], axis=1)

    def frame_angles(self, layout: StreamLayout) -> Float:
        """Angles by which one frame further turns a key, float64 [pairs]; equal for every cell."""
        per_frame = {Axis.POSITION: layout.frame_length, Axis.FRAME: 1, Axis.ROW: 0, Axis.COLUMN: 0}
        return np.concatenate([per_frame[a.axis] * np.asarray(a.frequencies) for a in self.axes])


def linear_rotary(head_size: int, theta: float) -> Rotary:
    """One-dimensional rotary over the raster position: frequency ``theta^(-2i/head_size)`` for pair i."""
    return Rotary((RotaryAxis(Axis.POSITION, geometric_frequencies(head_size, theta)),))


def geometric_frequencies(channels: int, theta: float) -> tuple[float, ...]:
    """Frequencies ``theta^(-2i/channels)``, i = 0 .. channels/2 - 1."""
    return tuple(float(f) for f in theta ** (-np.arange(0, channels, 2, dtype=np.float64) / channels))
