"""Marks that a licence asks for, on pictures and in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HEIGHT = 12
"""Of the letters, in pixels, where the line fits the picture."""
_MARGIN = 10


class Stamp:
    """A line of white letters in the lower right corner.

    Args:
        text: the line.
        size: (height, width) of the pictures; letters shrink until the line fits.
    """

    def __init__(self, text: str, size: tuple[int, int]) -> None:
        from PIL import Image, ImageDraw, ImageFont

        height, width = size
        margin = min(_MARGIN, height // 8, width // 8)
        long = ImageFont.load_default(_HEIGHT).getlength(text)
        letters = ImageFont.load_default(_HEIGHT * min(1.0, (width - 2 * margin) / long))
        image = Image.new("L", (width, height))
        ImageDraw.Draw(image).text((width - margin, height - margin), text, 255, letters, anchor="rs")
        self._cover: NDArray[np.uint16] = np.asarray(image, np.uint16)[:, :, None]

    def on(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The picture uint8 [height, width, 3] with the line on it."""
        shown = picture + (255 - picture.astype(np.uint16)) * self._cover // 255
        return shown.astype(np.uint8)


def tag_gif(path: Path, text: str) -> None:
    """Add a comment to a .gif, which FFmpeg cannot: ahead of the byte that ends it."""
    comment = text.encode("ascii", "replace")[:255]
    with path.open("rb+") as file:
        file.seek(-1, 2)
        file.write(b"\x21\xfe" + bytes([len(comment)]) + comment + b"\x00\x3b")
