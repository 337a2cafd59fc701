"""Next-token prediction in few passes: guess cells, verify many in one pass, keep what came out right.

First guesses are looked up in what was decoded before. How many rows a pass verifies is chosen by what a pass
costs, and by how many of its cells come out right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diagd.engines.engine import Int
from diagd.errors import UsageError, expect
from diagd.runtime.decoders.decoder import Blocks, Decoder, begun, keep
from diagd.runtime.step import Result
from diagd.runtime.stream import Stream
from diagd.schedule import Block, feed, predicting, shifted

_PLACES: Final = 1 << 16  # a megabyte; what is remembered last at a place stays there
_LAST: Final = np.uint64(_PLACES - 1)
_CROSS: Final = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
_SEED, _FACTOR, _SHIFT = 0x9E3779B97F4A7C15, np.uint64(0xBF58476D1CE4E5B9), np.uint64(29)  # of SplitMix64

_KEPT: Final = 0.99  # of what was seen, a pass later: some dozen frames are remembered
_FIRST: Final = 32  # rows, while nothing is known; also how many rows cost as much as a pass without any
_SPREAD: Final = 8.0  # rows^2 over which widths must have spread to say what a row costs
_REJECTED: Final = 0.05  # share of guesses, while nothing is known
_OFTEN: Final = 8  # passes after which all is fitted anew
_SLOWER: Final = 1.1  # times what the quickest pass of a width took: what the next one counts as at most
_STEADY: Final = 16  # rows of windows that are not chosen
_BETWEEN: Final = 3  # frames between two that are tried the other way
_SHARE: Final = 0.01  # of the time that trials may cost
_BETTER: Final = 0.93  # of the time with chosen windows: what steady ones have to take

Float64: TypeAlias = NDArray[np.float64]
Kinds: TypeAlias = NDArray[np.int64]

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
    _keep = staticmethod(keep)

    def __init__(
        self, window: int | None = None, *, deadline: float | None = None, draft: Draft | None = None
    ) -> None:
        expect(JacobiDecoder.__init__, locals())
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
            self._policy = WindowPolicy(cells)

    @override
    def blocks(self, stream: Stream) -> Blocks:
        """A block is one pass."""
        began = time.perf_counter()
        if not (yield from begun(stream)):
            return
        start = stream.layout.first_cell(stream.begun - 1)
        if self._draft:
            stream.give(stream.begun - 1, self._draft(stream))
            found, draft = None, stream.frame(stream.begun - 1).reshape(-1)
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
        kinds: Kinds = found.kinds if found else np.zeros(len(draft), np.int64)
        unfed = 0 if decided else start - 1 - stream.fed
        while decided < len(draft):
            if unfed > min(stream.max_width - 1, stream.layout.gap):  # no room for a window
                yield feed(np.arange(stream.fed, start - 1), stream.max_width)
                stream.fed, unfed = start - 1 - stream.layout.gap, 0
            rows = self._rows(stream, unfed, kinds[decided:])
            window = slice(decided, decided + rows)
            result = yield shifted(_window(0, unfed + rows, unfed), start + decided - 1 - unfed)
            began_keeping = time.perf_counter()
            kept = self._keep(draft[window], result.tokens)
            if self._policy:
                seconds = result.time.seconds + time.perf_counter() - began_keeping
                self._policy.add(kinds[window], kept, int(stream.padded[unfed + rows]), seconds)
            decided, unfed = decided + kept, 0
            if kept < rows:
                stream.rejected = start + decided - 1
            if decided < len(draft) and stream.renewed():
                decided, unfed = 0, start - 1 - stream.fed
                if found:
                    found = self._lookup.find(stream)
                    kinds = found.kinds
                    draft[:] = np.where(kinds > 0, found.tokens, draft)
                    stream.write(start, draft)
            if self._deadline is not None and time.perf_counter() - began > self._deadline:
                break
        if decided == len(draft):
            self._learn(found, draft)
        return decided

    def _learn(self, found: Lookup | None, tokens: Int) -> None:
        """Take what a frame became."""
        if self._policy:
            self._policy.end()
        if found:
            self._lookup.learn(found, tokens)

    def _rows(self, stream: Stream, unfed: int, kinds: Kinds) -> int:
        """Rows of the next window, over cells with guesses of these kinds, behind rows that are only fed."""
        most = min(len(kinds), stream.max_width - unfed)
        if self._policy is None:
            return min(most, self._window or most)
        return self._policy.choose(stream.padded[unfed + 1 : unfed + most + 1], kinds)


_window = lru_cache(maxsize=512)(predicting)


class Lookup(NamedTuple):
    """What was found of a frame.

    Attributes:
        tokens: int32 [cells], guesses.
        kinds: int64 [cells], 1 where a guess is remembered, 0 where the cell is to stay as it is.
        hashes: of the cells' neighbourhoods.
    """

    tokens: Int
    kinds: Kinds
    hashes: NDArray[np.uint64]


class LookupDraft:
    """Guesses that a cell becomes what it became when its neighbourhood was last seen under the same action.

    As prompt lookup decoding finds the words behind an n-gram, in space and time: the n-gram is a cell of the
    previous frame, its four neighbours, and the tokens of the action. The rules of a world are local and the
    same everywhere, so most cells are found after some dozen frames. One that is not found stays as it is.
    Streams that share it learn from one another.
    """

    def __init__(self) -> None:
        self._hashes: NDArray[np.uint64] = np.zeros(_PLACES, np.uint64)
        self._tokens: Int = np.zeros(_PLACES, np.int32)

    def find(self, stream: Stream) -> Lookup:
        """Guesses of the frame that began last."""
        frame = stream.begun - 1
        before = stream.frame(frame - 1)
        hashes = _hashes(before, stream.led(frame))
        places = hashes & _LAST
        known = self._hashes[places] == hashes
        tokens: Int = np.where(known, self._tokens[places], before.reshape(-1))
        return Lookup(tokens, known.astype(np.int64), hashes)

    def learn(self, found: Lookup, tokens: Int) -> None:
        """Take what a frame became."""
        places = found.hashes & _LAST
        self._hashes[places] = found.hashes
        self._tokens[places] = tokens


def _hashes(frame: Int, led: Int | None) -> NDArray[np.uint64]:
    """Of each cell's neighbourhood and the action, uint64 [cells]."""
    rows, columns = frame.shape
    around = np.pad(frame.astype(np.uint64) + np.uint64(1), 1)
    hashes = np.full((rows, columns), _SEED, np.uint64)
    for token in () if led is None else led.astype(np.uint64):
        hashes = (hashes ^ token) * _FACTOR
    for down, right in _CROSS:
        hashes ^= around[1 + down : 1 + down + rows, 1 + right : 1 + right + columns]
        hashes *= _FACTOR
        hashes ^= hashes >> _SHIFT
    return hashes.reshape(-1)


class WindowPolicy:
    """The window that decides most cells a second.

    A pass costs a part that does not depend on its rows and one for each; both are fitted to the quickest
    passes of each width, since what else runs on a machine only ever adds to one. A cell is decided if all
    guesses ahead of it in the window come out right. How often they do is counted by kind: whether one
    was looked up. All figures fade, so that a world that changes, or a window that became short, is tried
    again. A window of one row is next-token prediction: where drafts do not pay, that is what is left.

    Guesses are taken for independent of one another, which they are not: a cell that wide windows draw again
    and again comes right sooner than the draws of narrow ones let hope for. So now and then a frame is tried
    in steady windows, and they stay for as long as its frames take less.

    Args:
        cells: most rows that are of use.
    """

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self._wrong, self._guesses = np.zeros(2), np.zeros(2)  # by kind
        self._count = 0
        self._passes: Float64 = np.zeros(0)  # by the rows that they are run as
        self._quickest: Float64 = np.zeros(0)  # seconds
        self._steady = self._tries = False  # which way frames go, and whether this one goes the other
        self._cost = self._row = 0.0  # seconds of a pass without rows, and of a row, as fitted
        self._spent, self._usual, self._total = 0.0, 0.0, 0.0  # by these: this frame, a usual one, all
        self._ratio, self._debt, self._since = 1.0, 0.0, 0  # of trials to usual frames; seconds; frames

    def choose(self, padded: Int, kinds: Kinds) -> int:
        """Rows of the next window, at most ``len(padded)``, of which n are run as ``padded[n - 1]``.

        ``kinds``: of the guesses of its cells, see ``Lookup``.
        """
        if not self._count:
            return min(_FIRST, len(padded))
        if self._count <= _OFTEN or self._count % _OFTEN == 0:
            self._cost, self._row = self._costs()
            usual = (self._wrong.sum() + _REJECTED) / (self._guesses.sum() + 1)
            self._hazard = (self._wrong + usual) / (self._guesses + 1)
        if self._steady != self._tries:
            return min(_STEADY, len(padded))
        reached = np.ones(len(padded))
        np.cumprod(1 - self._hazard[kinds[: len(padded) - 1]], out=reached[1:])
        return int((reached.cumsum() / (self._cost + self._row * padded)).argmax()) + 1

    def add(self, kinds: Kinds, kept: int, padded: int, seconds: float) -> None:
        """Learn of a pass over guesses of these kinds, run as ``padded``, that decided the first ``kept``."""
        self._count += 1
        self._spent += self._cost + self._row * padded
        if self._steady == self._tries:
            tested = kinds[: min(kept, len(kinds) - 1)]
            self._guesses = self._guesses * _KEPT + np.bincount(tested, minlength=2)
            self._wrong *= _KEPT
            if kept < len(kinds):
                self._wrong[tested[-1]] += 1
        if padded >= len(self._passes):
            wider = padded + 1 - len(self._passes)
            self._passes = np.pad(self._passes, (0, wider))
            self._quickest = np.pad(self._quickest, (0, wider), constant_values=np.inf)
        self._passes *= _KEPT
        self._passes[padded] += 1
        self._quickest[padded] = min(seconds, _SLOWER * self._quickest[padded])

    def end(self) -> None:
        """A frame is decided; say how the next one is."""
        spent, self._spent = self._spent, 0.0
        self._total += spent
        usual = self._usual or spent
        if not self._tries:
            self._usual, self._since = usual + (spent - usual) / 5, self._since + 1
        else:
            self._ratio += (spent / usual - self._ratio) / 10
            self._debt, self._since = self._debt + max(spent - usual, 0.0), 0
            if self._ratio < (1.0 if self._steady else _BETTER):
                self._steady, self._usual = not self._steady, usual * self._ratio
                self._ratio, self._debt = 1 / self._ratio, 0.0
        self._tries = self._since >= _BETWEEN and self._debt <= _SHARE * self._total

    def _costs(self) -> tuple[float, float]:
        """Seconds of a pass without rows, and of a row."""
        seen = np.flatnonzero(self._passes)
        # by themselves passes of fewer rows take no longer, and those of twice the rows at most twice as long
        quickest = np.minimum.accumulate(self._quickest[seen] / seen) * seen
        quickest = np.minimum.accumulate(quickest[::-1])[::-1]
        count = float(self._passes.sum())
        weights = self._passes[seen] / count
        rows, seconds = float(weights @ seen), float(weights @ quickest)
        away, doubt = seen - rows, _SPREAD / count
        row = (float(weights @ (away * quickest)) + doubt * seconds / (rows + _FIRST)) / (
            float(weights @ away**2) + doubt
        )
        row = min(max(row, 0.0), seconds / rows)
        return seconds - row * rows, row
