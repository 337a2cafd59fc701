"""How a stored picture is to be turned before it is shown, as phones and cameras note it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_IMAGES = (b"\xff\xd8", b"\x89PNG", b"RIFF")
_MARKS = (b"Exif\0\0", b"eXIf")
_HEAD_BYTES = 1 << 20
_ORIENTATION = 0x0112

# Quarter turns against the clock, then whether left and right are exchanged (TIFF 6.0, "Orientation").
_EXIF = {1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False)}
_EXIF |= {7: (1, True), 8: (1, False)}


def turned(pixels: NDArray[np.uint8], turn: tuple[int, bool]) -> NDArray[np.uint8]:
    """Pixels [H, W, ...] after quarter turns against the clock, then mirrored."""
    pixels = np.rot90(pixels, turn[0])
    return pixels[:, ::-1] if turn[1] else pixels


def turn_of(frame: Any, exif: int) -> tuple[int, bool]:
    """Quarter turns and mirroring of a decoded frame; ``exif`` is that of its file, 0 where it says nothing.

    FFmpeg tells the angle of videos; of images it tells no mirroring.
    """
    if exif in _EXIF:
        return _EXIF[exif]
    return round(getattr(frame, "rotation", 0) / 90) % 4, False


def exif_orientation(path: Path) -> int:
    """Orientation 1 to 8 in the EXIF data of a JPEG, PNG or WebP file; 0 where there is none."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    starts = [head.find(mark) + len(mark) for mark in _MARKS if mark in head]
    if not head.startswith(_IMAGES) or not starts:
        return 0
    try:
        return _tag(head[min(starts) :])
    except struct.error:  # cut off
        return 0


def _tag(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 0
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, first)
    for entry in range(min(count, 1000)):
        at = first + 2 + 12 * entry
        if struct.unpack_from(order + "H", tiff, at)[0] == _ORIENTATION:
            return int(struct.unpack_from(order + "H", tiff, at + 8)[0])
    return 0
