"""Tokens to pictures as they come, and pictures to bytes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from types import ModuleType
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


class PictureEncoder:
    """PNG for small pictures, JPEG for others.

    Attributes:
        kind: MIME type.

    Raises:
        DependencyError: pictures are large and simplejpeg is not installed.
    """

    def __init__(self, height: int, width: int) -> None:
        self.kind = "image/png" if height * width <= SMALL else "image/jpeg"
        self._jpeg = None if self.kind == "image/png" else _simplejpeg().encode_jpeg

    def __call__(self, picture: Pictures) -> bytes:
        """Bytes of a picture uint8 [height, width, 3]."""
        if self._jpeg is None:
            return png(picture)
        jpeg: bytes = self._jpeg(np.ascontiguousarray(picture), quality=_QUALITY, colorsubsampling="420")
        return jpeg


def _simplejpeg() -> ModuleType:
    return require("simplejpeg", extra="play", purpose="send large pictures to a browser")


def png(picture: Pictures) -> bytes:
    """A picture uint8 [height, width, 3] as PNG (ISO/IEC 15948), its rows unfiltered."""
    height, width, _ = picture.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)
    rows[:, 1:] = picture.reshape(height, -1)
    chunks = (
        (b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes(), 1)),
        (b"IEND", b""),
    )
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
