"""Position tables as functions of the raster position: rotary angles and additive sinusoids."""

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
        """Angles of the first ``positions`` raster positions, float64 [positions, pairs], radians."""
        at = coordinates(layout, positions)
        return np.concatenate([np.outer(at[a.axis], a.frequencies) for a in self.axes], axis=1)

    def frame_angles(self, layout: StreamLayout) -> Float:
        """Angles by which one frame further turns a key, float64 [pairs]; equal for every cell."""
        per_frame = {Axis.POSITION: layout.frame_length, Axis.FRAME: 1, Axis.ROW: 0, Axis.COLUMN: 0}
        return np.concatenate([per_frame[a.axis] * np.asarray(a.frequencies) for a in self.axes])


def coordinates(layout: StreamLayout, positions: int) -> dict[Axis, NDArray[np.int64]]:
    """Coordinates of the first ``positions`` raster positions, int64 [positions] each.

    Prefix tokens stand at 0 on the grid axes; known tokens of a frame at its first cell.
    """
    position = np.arange(positions)
    behind = position - layout.prefix
    place = behind % layout.frame_length - layout.before
    cell = np.where((behind >= 0) & (place >= 0) & (place < layout.cells), place, 0)
    return {
        Axis.POSITION: position,
        Axis.FRAME: np.maximum(behind, 0) // layout.frame_length,
        Axis.ROW: cell // layout.columns,
        Axis.COLUMN: cell % layout.columns,
    }


def linear_rotary(head_size: int, theta: float) -> Rotary:
    """One-dimensional rotary over the raster position: frequency ``theta^(-2i/head_size)`` for pair i."""
    return Rotary((RotaryAxis(Axis.POSITION, geometric_frequencies(head_size, theta)),))


def grid_rotary(
    head_size: int, theta: float, *, yarn_scale: float = 1.0, trained: tuple[int, int] = (1, 1)
) -> Rotary:
    """Three-dimensional rotary of Cosmos: pairs of frame, row and column, in this order.

    Rows and columns get ``2 (head_size // 6)`` channels each, frames the rest.

    Args:
        head_size: channels of a head.
        theta: base of the frequencies.
        yarn_scale: see ``yarn``; 1 leaves the frequencies alone.
        trained: frames, and cells along either spatial axis, that the model was first trained on.
    """
    across = 2 * (head_size // 6)
    frames, cells = trained
    time = yarn(geometric_frequencies(head_size - 2 * across, theta), frames, yarn_scale)
    space = yarn(geometric_frequencies(across, theta), cells, yarn_scale)
    return Rotary((RotaryAxis(Axis.FRAME, time), RotaryAxis(Axis.ROW, space), RotaryAxis(Axis.COLUMN, space)))


def geometric_frequencies(channels: int, theta: float) -> tuple[float, ...]:
    """Frequencies ``theta^(-2i/channels)``, i = 0 .. channels/2 - 1."""
    return tuple(float(f) for f in theta ** (-np.arange(0, channels, 2, dtype=np.float64) / channels))


def yarn(frequencies: tuple[float, ...], trained: int, scale: float) -> tuple[float, ...]:
    """Frequencies stretched for a longer context (YaRN, arXiv 2309.00071, as released for Cosmos 12B).

    A frequency of more than four turns over the ``trained`` length is kept, one of fewer than one turn is
    divided by ``scale``, with a linear ramp between. The released code computes YaRN's factor of magnitude
    and does not apply it; neither do we.
    """
    frequency = np.asarray(frequencies)
    high, low = 2 * np.pi * 4.0 / trained, 2 * np.pi / trained
    kept = np.clip((frequency - low) / (high - low), 0, 1)
    return tuple(float(f) for f in frequency * ((1 - kept) / scale + kept))


def grid_sinusoids(layout: StreamLayout, positions: int, width: int) -> NDArray[np.float32]:
    """Additive embedding of frame, row and column, float32 [positions, width]; prefix rows are 0.

    Rows and columns get ``2 (width // 6)`` channels each, frames the rest, in the order frame, row, column;
    each part is [sin | cos] of ``coordinate * 10000^(-i / pairs)``.
    """
    at = coordinates(layout, positions)
    across = 2 * (width // 6)
    table = np.zeros((positions, width), np.float32)
    start = 0
    for axis, channels in ((Axis.FRAME, width - 2 * across), (Axis.ROW, across), (Axis.COLUMN, across)):
        frequency = geometric_frequencies(channels, 10_000.0)
        angles = np.outer(np.arange(at[axis].max() + 1), frequency)
        part = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
        table[:, start : start + channels] = part[at[axis]]
        start += channels
    table[: layout.prefix] = 0
    return table
