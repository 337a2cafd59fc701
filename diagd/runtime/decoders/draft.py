"""Draft and target: a cheaper decoder proposes a frame, the target keeps it or decodes its own."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from diagd.engines.engine import Float, Int
from diagd.errors import UsageError
from diagd.runtime.decoders.decoder import Blocks, Decoder, begun, decided_by
from diagd.runtime.decoders.jacobi import JacobiDecoder
from diagd.runtime.decoders.scheduled import RasterDecoder, raster_passes
from diagd.runtime.decoders.scoring import Proposal, Scorer
from diagd.runtime.step import Result
from diagd.runtime.stream import Stream
from diagd.schedule import Block

if TYPE_CHECKING:
    from diagd.runtime.session import Session


class DraftDecoder(Decoder):
    """Speculates frame by frame, with one knob from the drafter alone to the target alone.

    The drafter decodes a frame with the target's seed. The target runs over it in one wide pass, which gives
    its likelihood, the target's K/V rows, and what the target would draw. A frame that scores at least
    ``tau`` is kept; another one is decoded by the target, from what it drew on. The first frame after a
    start, a move of the stream or a context that was fed again is always the target's.

    Args:
        drafter: over another bundle of the same layout and tokens, another precision of it, or the same;
            it follows the target's stream, and is not the session that this decoder is given to.
        tau: least score of a frame that is kept. Infinity is the target alone, exact; minus infinity the
            drafter alone, from the first frame on.
        score: of a proposal; see ``diagd.runtime.decoders.scoring``.
        decoder: of the drafter; default: its bundle's.
        window: of the target's own decoding; see ``JacobiDecoder``.
        target_first: the first frame is the target's.

    Attributes:
        kept: for each frame so far, whether it is the drafter's.
        scores: of the frames so far; NaN where none was needed.
    """

    ragged = True

    def __init__(
        self,
        drafter: Session,
        tau: float,
        score: Scorer,
        *,
        decoder: Decoder | None = None,
        window: int | None = None,
        target_first: bool = True,
    ) -> None:
        if math.isnan(tau):
            raise UsageError("tau is not a number; give the least score of a frame that is kept, inf or -inf")
        self._drafter, self._tau, self._score = drafter, tau, score
        self._decoder, self._target = decoder, JacobiDecoder(window)
        self._target_first = target_first and tau > -math.inf
        self._followed: tuple[Stream, int, int] | None = None
        self.kept: list[bool] = []
        self.scores: list[float] = []

    @override
    def check(self, stream: Stream) -> None:
        """Drafter and target are two sessions over streams of one layout."""
        mine, other = self._drafter.layout, stream.layout
        if mine != other or self._drafter.window != stream.window:
            raise UsageError(
                f"the drafter has {mine} and a window of {self._drafter.window}, the target {other} and "
                f"{stream.window}; draft with the same layout, tokens and window"
            )
        if self._drafter.stream is stream:
            raise UsageError("the drafter is the target's own session; open a second session to draft with")
        self._target.check(stream)

    @override
    def blocks(self, stream: Stream) -> Blocks:
        began = time.perf_counter()
        if not (yield from begun(stream)):
            return
        frame = stream.begun - 1
        start, moved = stream.layout.first_cell(frame), self._follow(stream)
        draft, refills = self._draft(stream, frame), stream.refills
        stream.write(start, draft)
        drawn, logits = yield from self._verify(stream, start)
        first = self._target_first and (moved or stream.refills != refills)
        if keep := self._keeps(first, Proposal(draft.reshape(stream.layout.rows, -1), drawn, logits)):
            exact = bool((draft == drawn).all())
        else:
            exact, decided = True, decided_by(draft, drawn)
            draft[:] = drawn
            stream.write(start, draft)
            if decided < len(draft):
                stream.rejected = start + decided - 1
                yield from self._target.decide(stream, start, draft, began, decided)
            self._replace(stream, frame, draft)
        self.kept.append(keep)
        stream.complete(None, exact=exact)
        self._followed = stream, stream.beginnings, stream.known

    def _keeps(self, first: bool, proposal: Proposal) -> bool:
        """Whether a proposal is good enough."""
        score = math.nan if first or math.isinf(self._tau) else self._score(proposal)
        self.scores.append(score)
        return not first and (self._tau == -math.inf or score >= self._tau)

    def _follow(self, stream: Stream) -> bool:
        """Have the drafter's stream stand where the target's stands; whether it was moved there."""
        if self._followed == (stream, stream.beginnings, stream.known):
            return False
        self._drafter.stream.restore(stream.snapshot())
        return True

    def _draft(self, stream: Stream, frame: int) -> Int:
        """The drafter's tokens [cells]."""
        made = self._drafter.step(
            stream.led(frame), self._decoder, sampling=stream.settings, seed=stream.seed
        )
        return made.tokens.reshape(-1)

    def _verify(self, stream: Stream, start: int) -> Generator[Block, Result, tuple[Int, Float]]:
        """Run the target over the draft: what it draws [cells], and, for a score, its logits [cells, V]."""
        drawn, logits, scored = [], [], not math.isinf(self._tau)
        for block in raster_passes(stream.fed, start, stream.layout.cells, stream.max_width):
            result = yield block
            drawn.append(result.tokens)
            if scored:
                logits.append(result.logits.copy())
        return np.concatenate(drawn), np.concatenate(logits) if scored else np.zeros((0, 0), np.float32)

    def _replace(self, stream: Stream, frame: int, tokens: Int) -> None:
        """Have the drafter go on from the target's frame."""
        ids = stream.led(frame)
        self._drafter.stream.rewind(1)
        grid = tokens.reshape(stream.layout.rows, stream.layout.columns)
        forced = RasterDecoder([grid])
        for _ in self._drafter.frames(forced, None if ids is None else [ids], count=1):
            pass
