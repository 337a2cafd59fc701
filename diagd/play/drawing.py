"""A picture as what terminals show: by kitty's graphics, by sixel, or as half blocks."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagd.play.pictures import Pictures

ESC, END = b"\x1b", b"\x1b\\"
_CHUNK: Final = 4096
"""Most bytes of a piece of kitty graphics, in base64."""

_LEVELS: Final = 6  # of each colour in sixel, which has 256 registers
_BAND: Final = 6  # rows of pixels of one sixel
_CELL: Final = 2.0  # height of a character over its width, about


Draw = Callable[[Pictures, int, int], bytes]
"""Gives what draws a picture uint8 [height, width, 3] at the top left of so many rows and columns."""


def fitted(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """Characters (rows, columns) that a picture fills in its proportions."""
    across = min(columns, int(rows * _CELL * width / height))
    return max(1, round(across * height / width / _CELL)), max(1, across)


def kitty(picture: Pictures, rows: int, columns: int) -> bytes:
    """The graphics protocol of kitty, which scales by itself; the picture before is replaced."""
    height, width = picture.shape[:2]
    rows, columns = fitted(height, width, rows, columns)
    data = base64.b64encode(np.ascontiguousarray(picture).tobytes())
    pieces = [data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK)]
    head = b"a=T,f=24,s=%d,v=%d,i=1,p=1,q=2,C=1,c=%d,r=%d," % (width, height, columns, rows)
    parts = [ESC + b"[H"]
    for number, piece in enumerate(pieces):
        more = b"m=%d;" % (number + 1 < len(pieces))
        parts.append(ESC + b"_G" + (head if not number else b"") + more + piece + END)
    return b"".join(parts)


def sixel(picture: Pictures, rows: int, columns: int) -> bytes:
    """DEC's graphics: colours are rounded to a cube of 216."""
    scale = max(1, min(columns * 8 // picture.shape[1], rows * 16 // picture.shape[0]))
    big = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    steps = (big.astype(np.uint16) * (_LEVELS - 1) + 127) // 255
    ids = (steps[..., 0] * _LEVELS + steps[..., 1]) * _LEVELS + steps[..., 2]
    height, width = ids.shape
    used = np.unique(ids)
    parts = [ESC + b"[H" + ESC + b'Pq"1;1;%d;%d' % (width, height)]
    for color in used.tolist():
        red, green, blue = (100 * (color // _LEVELS**place % _LEVELS) // (_LEVELS - 1) for place in (2, 1, 0))
        parts.append(b"#%d;2;%d;%d;%d" % (color, red, green, blue))
    weights = 1 << np.arange(_BAND, dtype=np.uint8)
    for top in range(0, height, _BAND):
        band = ids[top : top + _BAND]
        for color in np.unique(band).tolist():
            bits = ((band == color) * weights[: len(band), None]).sum(0, dtype=np.uint8)
            parts.append(b"#%d" % color + _runs(bits) + b"$")
        parts.append(b"-")
    return b"".join([*parts, END])


def _runs(bits: NDArray[np.uint8]) -> bytes:
    """Sixels of one colour, equal neighbours told by their number."""
    starts = np.flatnonzero(np.diff(bits, prepend=bits[0] ^ 1))
    counts = np.diff(starts, append=len(bits)).tolist()
    signs = (bits[starts] + 63).tolist()
    return b"".join(
        b"!%d%c" % pair if pair[0] > 3 else bytes([pair[1]]) * pair[0]
        for pair in zip(counts, signs, strict=True)
    )


class Blocks:
    """Draws two pixels a character; characters that did not change are not drawn again."""

    _before: NDArray[np.uint8] | None = None

    def __call__(self, picture: Pictures, rows: int, columns: int) -> bytes:
        """What a terminal is sent to show uint8 [height, width, 3] in so many character rows and columns."""
        height, width = picture.shape[:2]
        rows, columns = fitted(height, width, rows, columns)
        down = np.arange(2 * rows) * height // (2 * rows)
        across = np.arange(columns) * width // columns
        cells = picture[down][:, across].reshape(rows, 2, columns, 3).swapaxes(1, 2).reshape(rows, columns, 6)
        before = self._before
        changed = np.ones((rows, columns), bool)
        if before is not None and before.shape == cells.shape:
            changed = (cells != before).any(-1)
        self._before = cells
        parts = []
        for row in np.flatnonzero(changed.any(1)).tolist():
            last = -2
            for column in np.flatnonzero(changed[row]).tolist():
                if column != last + 1:
                    parts.append(b"\x1b[%d;%dH" % (row + 1, column + 1))
                parts.append(
                    b"\x1b[38;2;%d;%d;%d;48;2;%d;%d;%dm\xe2\x96\x80" % tuple(cells[row, column].tolist())
                )
                last = column
        return b"".join([*parts, b"\x1b[0m"])
