"""Tokens to pictures as they come, and pictures to bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Int
from diagd.errors import require
from diagd.runtime.pixels import PixelCodec

Pictures = NDArray[np.uint8]

SMALL: Final = 200 * 200
"""Pixels up to which a picture is sent without loss: it is small then, and often made of tiles."""

_QUALITY: Final = 85  # of 100


class View:
    """The pictures of a stream's frames, also after it was moved.

    A tokenizer that compresses time draws a frame from some before it, so a view that is moved looks at these
    again.
    """

    def __init__(self, codec: PixelCodec) -> None:
        self.codec = codec
        self._next: Int | None = None
        self._pictures = codec.stream(self._tokens())

    def _tokens(self) -> Iterator[Int]:
        while self._next is not None:
            yield self._next

    def show(self, tokens: Int) -> Pictures:
        """Pictures uint8 [n, height, width, 3] of the next frame [rows, columns]."""
        self._next = tokens
        return next(self._pictures)

    def move(self, past: Sequence[Int]) -> Pictures:
        """Be behind frames [rows, columns]; gives the pictures of the last one."""
        self._pictures = self.codec.stream(self._tokens())
        for tokens in past[-self.codec.latents :]:
            pictures = self.show(tokens)
        return pictures


def picture_encoder(height: int, width: int) -> tuple[str, Callable[[Pictures], bytes]]:
    """MIME type, and what encodes a picture uint8 [height, width, 3]: PNG for small ones, JPEG for others.

    Raises:
        DependencyError: pictures are large and simplejpeg is not installed.
    """
    if height * width <= SMALL:
        return "image/png", png
    simplejpeg = require("simplejpeg", extra="play", purpose="send large pictures to a browser")
    options = {"quality": _QUALITY, "colorsubsampling": "420"}
    return "image/jpeg", lambda picture: simplejpeg.encode_jpeg(np.ascontiguousarray(picture), **options)


def png(picture: Pictures, program: str | None = None) -> bytes:
    """A picture uint8 [height, width, 3] as PNG, which may name the program that made it."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    target, tags = io.BytesIO(), PngInfo()
    if program is not None:
        tags.add_text("Software", program)
    Image.fromarray(picture).save(target, "PNG", pnginfo=tags, compress_level=1)
    return target.getvalue()
