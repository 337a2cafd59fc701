"""How many rows a pass verifies: chosen by what a pass costs, and by how many of its cells come out right."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Int

_KEPT: Final = 0.99  # of what was seen, a pass later: some dozen frames are remembered
_FIRST: Final = 32  # rows, while nothing is known; also how many rows cost as much as a pass without any
_SPREAD: Final = 8.0  # rows^2 over which widths must have spread to say what a row costs
_REJECTED: Final = 0.05  # share of guesses, while nothing is known
_AHEAD: Final = 0.7  # of what it is worth to draw a cell ahead of its turn: further passes would do so too
_OFTEN: Final = 8  # passes after which all is fitted anew
_SLOWER: Final = 1.1  # times what the quickest pass of a width took: what the next one counts as at most

Float64: TypeAlias = NDArray[np.float64]
Kinds: TypeAlias = NDArray[np.int64]


class WindowPolicy:
    """The window that decides most cells a second.

    A pass costs a part that does not depend on its rows and one for each; both are fitted to the quickest
    passes of each width, since what else runs on a machine only ever adds to one. A cell is decided if all
    guesses ahead of it in the window come out right. How often they do is counted by kind: how much a first
    guess is trusted, below ``kinds``, and as many kinds of guesses that a pass has drawn. A cell that is not
    decided is worth something where no pass has drawn it before: as much less often as guesses that were
    drawn once are wrong, a pass is saved. All figures fade, so that a world that changes, or a window that
    became short, is tried again. A window of one row is next-token prediction: where drafts do not pay, that
    is what is left.

    Args:
        cells: most rows that are of use.
        kinds: of first guesses.
    """

    def __init__(self, cells: int, kinds: int = 1) -> None:
        self.cells, self.kinds = cells, kinds
        self._wrong, self._guesses = np.zeros(2 * kinds), np.zeros(2 * kinds)
        self._decided, self._count = 0.0, 0
        self._passes: Float64 = np.zeros(0)  # by the rows that they are run as
        self._quickest: Float64 = np.zeros(0)  # seconds

    def choose(self, padded: Int, kinds: Kinds) -> int:
        """Rows of the next window, at most ``len(padded)``, of which n are run as ``padded[n - 1]``.

        ``kinds``: of the guesses of its cells.
        """
        kinds = kinds[: len(padded)]
        if not self._count:
            return min(_FIRST, len(padded))
        if self._count <= _OFTEN or self._count % _OFTEN == 0:
            self._cost, self._row = self._costs()
            self._hazard, self._ahead = self._hazards()
        reached = np.ones(len(padded))
        np.cumprod(1 - self._hazard[kinds[:-1]], out=reached[1:])
        worth = (reached + (1 - reached) * self._ahead[kinds]).cumsum()
        return int((worth / (self._cost + self._row * padded)).argmax()) + 1

    def add(self, kinds: Kinds, kept: int, padded: int, seconds: float) -> None:
        """Learn of a pass over guesses of these kinds, run as ``padded``, that decided the first ``kept``."""
        self._count += 1
        tested = kinds[: min(kept, len(kinds) - 1)]
        self._guesses = self._guesses * _KEPT + np.bincount(tested, minlength=2 * self.kinds)
        self._wrong *= _KEPT
        if kept < len(kinds):
            self._wrong[tested[-1]] += 1
        if padded >= len(self._passes):
            wider = padded + 1 - len(self._passes)
            self._passes = np.pad(self._passes, (0, wider))
            self._quickest = np.pad(self._quickest, (0, wider), constant_values=np.inf)
        self._passes *= _KEPT
        self._passes[padded] += 1
        self._decided = self._decided * _KEPT + kept
        self._quickest[padded] = min(seconds, _SLOWER * self._quickest[padded])

    def _hazards(self) -> tuple[Float64, Float64]:
        """Chance that a guess is wrong, and what it is worth, in decided cells, to draw it; by kind.

        The second as far as it is known: a standard error is taken off.
        """
        usual = (self._wrong.sum() + _REJECTED) / (self._guesses.sum() + 1)
        hazard = (self._wrong + usual) / (self._guesses + 1)
        fresh, drawn = hazard.reshape(2, -1)
        error = np.sqrt(usual * (1 - usual) * (1 / (self._guesses + 1)).reshape(2, -1).sum(axis=0))
        saved = np.maximum(fresh - drawn - error, 0.0) * _AHEAD * self._decided / self._passes.sum()
        return hazard, np.append(saved, np.zeros(self.kinds))

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


def decided_by(guesses: Int, drawn: Int) -> int:
    """Tokens [n] that what was drawn behind guesses decides: up to the first that was guessed wrong."""
    wrong = drawn[:-1] != guesses[:-1]
    return int(wrong.argmax()) + 1 if wrong.any() else len(guesses)
