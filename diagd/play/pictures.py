"""Tokens to pictures as they come, and pictures to bytes."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Int
from diagd.runtime.pixels import PixelCodec

Pictures = NDArray[np.uint8]

SMALL: Final = 200 * 200
"""Pixels up to which a picture is sent without loss: it is small then, and often made of tiles."""


class View:
    """The pictures of a stream's frames, also after it was moved.

    A tokenizer that compresses time draws a frame from some before it, so a view that is moved looks at these
    again.
    """

    def __init__(self, codec: PixelCodec) -> None:
        self.codec = codec
        self._next: Int | None = None
        self._past: deque[Int] = deque(maxlen=codec.latents)
        self._pictures = codec.stream(self._tokens())

    def _tokens(self) -> Iterator[Int]:
        while self._next is not None:
            yield self._next

    def show(self, tokens: Int) -> Pictures:
        """Pictures uint8 [n, height, width, 3] of the next frame [rows, columns]."""
        self._next = tokens
        self._past.append(tokens)
        pictures = next(self._pictures, None)  # None: the one before was interrupted
        return self.move([*self._past]) if pictures is None else pictures

    def move(self, past: Sequence[Int]) -> Pictures:
        """Be behind frames [rows, columns]; gives the pictures of the last one."""
        self._pictures = self.codec.stream(self._tokens())
        for tokens in past[-self.codec.latents :]:
            pictures = self.show(tokens)
        return pictures


def picture_encoder(height: int, width: int) -> tuple[str, Callable[[Pictures], bytes]]:
    """MIME type, and what encodes a picture uint8 [height, width, 3]: PNG for small ones, JPEG for others."""
    if height * width <= SMALL:
        return "image/png", png
    return "image/jpeg", partial(_saved, format="JPEG", quality=85, subsampling="4:2:0")


def png(picture: Pictures, program: str | None = None) -> bytes:
    """A picture uint8 [height, width, 3] as PNG, which may name the program that made it."""
    from PIL.PngImagePlugin import PngInfo

    tags = PngInfo()
    if program is not None:
        tags.add_text("Software", program)
    return _saved(picture, format="PNG", pnginfo=tags, compress_level=1)


def _saved(picture: Pictures, **options: Any) -> bytes:
    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(picture).save(target, **options)
    return target.getvalue()
