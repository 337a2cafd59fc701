"""What a decoder is."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol, TypeAlias

from diagd.runtime.step import Result
from diagd.runtime.stream import Stream
from diagd.schedule import Block

Blocks: TypeAlias = Generator[Block, Result, None]


class Decoder(Protocol):
    """Decodes a stream, a frame further each call. It keeps nothing between calls: state is the stream's.

    Attributes:
        ragged: how many passes a frame takes depends on what is drawn.
    """

    ragged: bool = False

    def check(self, stream: Stream) -> None:
        """Refuse what cannot be decoded in the stream's window, or by its engine, before anything runs.

        Raises:
            UsageError: it cannot.
        """

    def blocks(self, stream: Stream) -> Blocks:
        """Yield blocks of steps and receive the result of the last step of each, until a frame is complete.

        ``begun(stream)`` takes the next frame's action, or has the model decode it, and says whether there is
        one; ``stream.begin()`` begins one beside others that are in flight; ``stream.write`` sets tokens;
        ``stream.complete`` counts a frame as known. A generator that ends without completing a frame ends the
        run.
        """
