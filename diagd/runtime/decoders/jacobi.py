"""Next-token prediction in few passes: guess cells, verify many in one pass, keep what came out right."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from functools import lru_cache

import numpy as np
from typing_extensions import override

from diagd.engines.engine import Int
from diagd.errors import UsageError
from diagd.runtime.decoders.acting import begun
from diagd.runtime.decoders.decoder import Blocks, Decoder
from diagd.runtime.decoders.lookup import TRUST, Lookup, LookupDraft
from diagd.runtime.decoders.window import Kinds, WindowPolicy, decided_by
from diagd.runtime.step import Result
from diagd.runtime.stream import Stream
from diagd.schedule import NO_SINK, Block, feed, shifted

Draft = Callable[[Stream], Int]
"""Guesses int32 [cells] of the frame that has just begun."""


class JacobiDecoder(Decoder):
    """Decodes exactly the tokens of next-token prediction, whatever the drafts and windows.

    A window of cells is fed in raster order, guesses in place of those not decided, and each row draws the
    cell behind it. A draw is a function of the row's logits, the seed and the cell's position, so the first
    one is next-token prediction's; so is every further one as long as all guesses before it turn out to be
    what was drawn. These cells are kept, rows of wrong guesses are given back, and the draws are the next
    guesses.

    Frames are decoded one after another: a new action counts for the frame that it leads to, and one that is
    newer than a frame under way begins it anew, with what was drawn so far as guesses where none is looked
    up. One that the model decodes is guessed and verified in the same way, ahead of its frame.

    Args:
        window: rows that a pass verifies, its first included; default: chosen as it goes, see
            ``WindowPolicy``. 1 is next-token prediction.
        deadline: seconds after which a frame ends with what is guessed, marked as not exact; one more pass
            feeds the guesses.
        draft: first guesses of a frame; default: ``LookupDraft``.

    Raises:
        UsageError: no such window or deadline.
    """

    ragged = True

    def __init__(
        self, window: int | None = None, *, deadline: float | None = None, draft: Draft | None = None
    ) -> None:
        if window is not None and window < 1:
            raise UsageError(f"a window of {window} rows decides nothing; choose 1 or more, or none for auto")
        if deadline is not None and not deadline > 0:
            raise UsageError(f"a deadline of {deadline} s has passed before a frame begins; choose more")
        self._window, self._deadline, self._draft = window, deadline, draft
        self._lookup = LookupDraft()
        self._policy: WindowPolicy | None = None

    @override
    def check(self, stream: Stream) -> None:
        """Any stream goes; what was learned of windows is kept where frames have as many cells."""
        cells = stream.layout.cells
        if self._window is None and (self._policy is None or self._policy.cells != cells):
            self._policy = WindowPolicy(cells, TRUST)

    @override
    def blocks(self, stream: Stream) -> Blocks:
        """A block is one pass."""
        began = time.perf_counter()
        if not (yield from begun(stream)):
            return
        start = stream.layout.first_cell(stream.begun - 1)
        if self._draft:
            found, draft = None, np.array(self._draft(stream), np.int32)
        else:
            found = self._lookup.find(stream)
            draft = found.tokens.copy()
        stream.write(start, draft)
        decided = yield from self.decide(stream, start, draft, began, found=found)
        if decided < len(draft):  # in time for the window that they belong to
            yield feed(np.arange(start + decided - 1, start + len(draft) - 1), stream.max_width)
        stream.complete(None, exact=decided == len(draft))

    def decide(
        self,
        stream: Stream,
        start: int,
        draft: Int,
        began: float,
        decided: int = 0,
        found: Lookup | None = None,
    ) -> Generator[Block, Result, int]:
        """Decide the cells of a frame; returns how many were in time.

        Args:
            stream: with the frame begun, and ``draft`` written.
            start: position of its first cell.
            draft: [cells], those decided, then guesses; takes what is drawn.
            began: when the frame began (``time.perf_counter``).
            decided: cells that are, and whose rows, but for the last one's, are fed.
            found: where the guesses were looked up.
        """
        kinds: Kinds = found.trust.copy() if found else np.zeros(len(draft), np.int64)
        unfed = 0 if decided else start - 1 - stream.fed
        if unfed > min(stream.max_width - 1, stream.layout.gap):  # a prompt
            yield feed(np.arange(stream.fed, start - 1), stream.max_width)
            stream.fed, unfed = start - 1 - stream.layout.gap, 0
        while decided < len(draft):
            rows = self._rows(stream, unfed, kinds[decided:])
            window = slice(decided, decided + rows)
            result = yield shifted(_pass(unfed, rows), start + decided - 1 - unfed)
            began_keeping = time.perf_counter()
            kept = self._keep(draft[window], result.tokens)
            if self._policy:
                seconds = result.time.seconds + time.perf_counter() - began_keeping
                self._policy.add(kinds[window], kept, int(stream.padded[unfed + rows]), seconds)
                kinds[window] = kinds[window] % TRUST + TRUST
            decided, unfed = decided + kept, 0
            if kept < rows:
                stream.rejected = start + decided - 1
            if decided < len(draft) and stream.renewed():
                decided, unfed = 0, start - 1 - stream.fed
                if found:
                    found = self._lookup.find(stream)
                    draft[:] = np.where(found.trust > 0, found.tokens, draft)
                    kinds = np.where(found.trust > 0, found.trust, kinds)
                    stream.write(start, draft)
            if self._deadline is not None and time.perf_counter() - began > self._deadline:
                break
        if found and decided == len(draft):
            self._lookup.learn(found, draft)
        return decided

    def _rows(self, stream: Stream, unfed: int, kinds: Kinds) -> int:
        """Rows of the next window, over cells with guesses of these kinds, behind rows that are only fed."""
        most = min(len(kinds), stream.max_width - unfed)
        if self._policy is None:
            return min(most, self._window or most)
        return self._policy.choose(stream.padded[unfed + 1 : unfed + most + 1], kinds)

    def _keep(self, guesses: Int, drawn: Int) -> int:
        """Take what a pass drew as the next guesses; returns how many of them are decided."""
        kept = decided_by(guesses, drawn)
        guesses[:] = drawn
        return kept


@lru_cache(maxsize=512)
def _pass(unfed: int, rows: int) -> Block:
    """A pass that feeds known tokens at positions from 0 on, and behind them a window."""
    positions = np.arange(unfed + rows)
    sinks = np.where(positions < unfed, NO_SINK, positions + 1)
    return Block(
        np.array([0, len(positions)]), positions, positions, sinks, np.zeros(len(positions), np.bool_)
    )
