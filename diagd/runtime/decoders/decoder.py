"""What a decoder is, and how each begins a frame: under the action given, or one that the model decodes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol, TypeAlias

import numpy as np
from typing_extensions import override

from diagd.engines.engine import Int
from diagd.errors import UsageError
from diagd.runtime.step import Result
from diagd.runtime.stream import Stream
from diagd.schedule import Block, feed, predicting

Blocks: TypeAlias = Generator[Block, Result, None]


class Decoder(Protocol):
    """Decodes a stream, a frame further each call. It keeps nothing between calls: state is the stream's.

    Attributes:
        ragged: how many passes a frame takes depends on what is drawn.
    """

    ragged: bool = False

    def check(self, stream: Stream) -> None:
        """Refuse (UsageError) what the stream's window or its engine cannot decode, before anything runs."""
        return

    def blocks(self, stream: Stream) -> Blocks:
        """Yield blocks of steps and receive the result of the last step of each, until a frame is complete.

        ``begun(stream)`` takes the next frame's action, or has the model decode it, and says whether there is
        one; ``stream.begin()`` begins one beside others that are in flight; ``stream.write`` sets tokens;
        ``stream.complete`` counts a frame as known. A generator that ends without completing a frame ends the
        run.
        """


def begun(stream: Stream, rows: int | None = None) -> Generator[Block, Result, bool]:
    """Begin the next frame, its action decoded where none is given; False where the run has no more.

    No frame is in flight. ``rows``: tokens of the action that a pass verifies; 1 is next-token prediction.
    None: all of them.
    """
    if stream.ask() and stream.action is None and stream.layout.gap:
        stream.action = yield from act(stream, rows)
    return stream.begin()


def act(stream: Stream, rows: int | None = None) -> Generator[Block, Result, Int]:
    """Decode the action behind the last known frame: exactly next-token prediction's, whatever ``rows``.

    Guesses are fed and verified as `JacobiDecoder` does it. The rows are given back: the action is fed again
    with the frame that it leads to, as one that is given, so a stream goes on alike wherever its actions come
    from. Which window it sees is up to the model's context; see ``ContextPolicy``.

    Raises:
        UsageError: the model's head has no ids for actions.
    """
    if stream.law is None:
        raise UsageError(
            f"frame {stream.known} has no action and this model decodes none: its head has visual tokens only"
        )
    stream.acting = True
    start, decided = stream.layout.first_cell(stream.known) - stream.layout.gap, 0
    if start - 1 > stream.fed:  # a prompt
        yield feed(np.arange(stream.fed, start - 1), stream.max_width)
        stream.fed = start - 1
    ids = stream.law.guess(stream.past[-1].actions)
    stream.write(start, ids)
    widest = min(rows or len(ids), stream.max_width)
    while decided < len(ids):
        first, last = start + decided, start + min(decided + widest, len(ids))
        result = yield predicting(first - 1, last - 1, first - 1, commit=False)
        sinks = np.arange(first, last)
        drawn = stream.law.draw(result.logits, decided, sinks, stream.sampling)
        decided += keep(ids[decided : decided + len(drawn)], drawn)
        stream.write(sinks, drawn)
        stream.rejected = start + decided - 1
    stream.rejected, stream.acting = stream.fed, False
    return ids


class ActingDecoder(Decoder):
    """Decodes the action behind the last frame, which then is ``stream.action``, and no frame."""

    @override
    def blocks(self, stream: Stream) -> Blocks:
        stream.action = yield from act(stream)


def keep(guesses: Int, drawn: Int) -> int:
    """Take what was drawn [n] behind guesses as the next ones.

    Returns how many of them are decided: up to the first that was guessed wrong.
    """
    wrong = drawn[:-1] != guesses[:-1]
    guesses[:] = drawn
    return int(wrong.argmax()) + 1 if wrong.any() else len(guesses)
