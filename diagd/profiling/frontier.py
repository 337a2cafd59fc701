"""Draws a schedule: which cells each step decodes, as text and as pictures."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.files import atomic_file
from diagd.errors import UsageError
from diagd.schedule import NO_SINK, Schedule, Table

Pixels = NDArray[np.uint8]

PICTURES: Final = (".gif", ".png")

_EMPTY: Final = np.array([38, 42, 54], np.uint8)
_BACKGROUND: Final = np.array([16, 18, 24], np.uint8)
_OLD: Final = np.array([52, 110, 176], np.uint8)
_FRONTIER: Final = np.array([255, 196, 61], np.uint8)
_CELL: Final = 10
_GAP: Final = 14


@dataclass(frozen=True)
class Frontier:
    """Steps of every cell of a run: int32 [frames, rows, columns], counted from the first that decodes."""

    steps: NDArray[np.int32]
    widths: NDArray[np.int32]

    @property
    def last(self) -> int:
        """The step that decodes the last cell."""
        return int(self.steps.max())


def frontier(schedule: Schedule, frames: int) -> Frontier:
    """The steps of ``frames`` frames behind one known frame."""
    layout = schedule.layout
    table = schedule.table(1, frames, 0)
    step_of_row = np.repeat(np.arange(table.steps, dtype=np.int32), table.widths)
    decoded = table.sinks != NO_SINK
    offset = table.sinks[decoded] - layout.first_cell(1)
    frame, cell = np.divmod(offset, layout.frame_length)
    steps = np.full((frames, layout.cells), -1, np.int32)
    steps[frame, cell] = step_of_row[decoded]
    return Frontier(steps.reshape(frames, layout.rows, layout.columns), table.widths.astype(np.int32))


def as_text(steps: NDArray[np.int32]) -> str:
    """The step of each cell of a frame [rows, columns], a line for each row."""
    size = len(str(int(steps.max())))
    return "\n".join(" ".join(f"{step:{size}d}" for step in row) for row in steps)


def table_lines(table: Table, first: int, count: int) -> list[str]:
    """Steps of a table in words: width, cells decoded, seeds, and positions that are only fed."""
    lines = []
    for index in range(first, min(first + count, table.steps)):
        step = table.step(index)
        decoded = int((step.sinks != NO_SINK).sum())
        seeds = int((step.sources != step.positions).sum())
        rows = ", ".join(
            f"{source}" + (f"@{position}" if source != position else "") + (f">{sink}" if sink >= 0 else "")
            for source, position, sink in zip(step.sources, step.positions, step.sinks, strict=True)
        )
        shown = rows if len(rows) <= 200 else f"{rows[:197]}..."
        lines.append(f"step {index}: {step.width} rows, {decoded} cells, {seeds} seeds: {shown}")
    return lines


def still(drawn: Frontier) -> Pixels:
    """All cells coloured by their step, uint8 [height, width, 3], early ones dark."""
    share = drawn.steps[..., None] / max(1, drawn.last)
    colours = _OLD + share * (_FRONTIER.astype(np.float64) - _OLD)
    return _grids(colours.astype(np.uint8))


def animation(drawn: Frontier) -> list[Pixels]:
    """One picture for each step: the frontier bright, decoded cells dim, the rest dark."""
    pictures = []
    for step in range(drawn.last + 1):
        colours = np.broadcast_to(_EMPTY, (*drawn.steps.shape, 3)).copy()
        colours[drawn.steps < step] = _OLD
        colours[drawn.steps == step] = _FRONTIER
        pictures.append(_grids(colours))
    return pictures


def draw(path: Path, drawn: Frontier, steps_a_second: float = 12.0) -> None:
    """Write the animation as .gif, or the still picture as .png.

    Raises:
        UsageError: another suffix.
    """
    if path.suffix.lower() == ".png":
        write_png(path, still(drawn))
    elif path.suffix.lower() == ".gif":
        from diagd.runtime.video import VideoWriter

        pictures = animation(drawn)
        with VideoWriter(path, steps_a_second, pictures[0].shape[:2]) as video:
            for picture in [*pictures, *[pictures[-1]] * int(steps_a_second)]:
                video.write(picture)
    else:
        raise UsageError(f"cannot draw {path}: expected a name ending in {' or '.join(PICTURES)}")


def write_png(path: Path, pixels: Pixels) -> None:
    """Write uint8 [height, width, 3] as PNG (ISO/IEC 15948), eight bits a channel, no filter."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    with atomic_file(path) as partial:
        partial.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _grids(colours: NDArray[np.uint8]) -> Pixels:
    """Frames [T, h, w, 3] side by side, cells with a thin border; sides are even."""
    frames, rows, columns, _ = colours.shape
    cells = np.repeat(np.repeat(colours, _CELL, axis=1), _CELL, axis=2)
    cells[:, ::_CELL], cells[:, :, ::_CELL] = _BACKGROUND, _BACKGROUND
    height, width = rows * _CELL + 2 * _GAP, frames * (columns * _CELL + _GAP) + _GAP
    picture = np.broadcast_to(_BACKGROUND, (height, width + width % 2, 3)).copy()
    for index, frame in enumerate(cells):
        left = _GAP + index * (columns * _CELL + _GAP)
        picture[_GAP : _GAP + rows * _CELL, left : left + columns * _CELL] = frame
    return picture
