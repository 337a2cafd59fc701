"""How many rows a pass verifies: chosen by what a pass costs, and by how many of its cells come out right."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Int

_KEPT: Final = 0.98  # of what was seen, a pass later: a few frames are remembered
_FIRST: Final = 32  # rows, while nothing is known; also how many rows cost as much as a pass without any
_SPREAD: Final = 25.0  # rows^2 over which widths must have spread to say what a row costs
_REJECTED: Final = 0.05  # share of cells, while nothing is known
_AHEAD: Final = 0.7  # of what it is worth to draw a cell ahead of its turn: further passes would do so too
_LEARNED: Final = 0.999  # of how often guesses were wrong, a pass later
_SLOWER: Final = 1.1  # times what the quickest pass of a width took: what the next one counts as at most


class WindowPolicy:
    """The window that decides most cells a second.

    A pass costs a part that does not depend on its rows and one for each; both are fitted to the quickest
    passes of each width, since what else runs on a machine only ever adds to one. A cell at offset j of a
    window comes out right if all those before it do: the share of windows that get so far is the product of
    what was right at each offset among those that reached it (Kaplan and Meier). One that is not decided is
    worth something where no pass has drawn it before: as much less often as guesses that were drawn once are
    wrong, a pass is saved. All figures fade, so that a world that changes, or a window that became short, is
    tried again. A window of one row is next-token prediction: where drafts do not pay, that is what is left.

    Args:
        cells: most rows that are of use.
    """

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self._reached: NDArray[np.float64] = np.zeros(cells)
        self._failed: NDArray[np.float64] = np.zeros(cells)
        self._wrong: NDArray[np.float64] = np.zeros(2)  # guesses that no pass had drawn, and that one had
        self._guesses: NDArray[np.float64] = np.zeros(2)
        self._drawn = 0  # cells of the next window that the last one drew
        self._decided = 0.0
        self._passes: NDArray[np.float64] = np.zeros(0)  # by the rows that they are run as
        self._quickest: NDArray[np.float64] = np.zeros(0)  # seconds

    def choose(self, padded: Int) -> int:
        """Rows of the next window, at most ``len(padded)``, of which n are run as ``padded[n - 1]``."""
        if not len(self._passes):
            return min(_FIRST, len(padded))
        cost, row = self._costs()
        worth = self._survival()[: len(padded)]
        worth[self._drawn :] += self._ahead() * (1 - worth[self._drawn :])
        return int((worth.cumsum() / (cost + row * padded)).argmax()) + 1

    def add(self, rows: int, kept: int, padded: int, seconds: float) -> None:
        """Learn of a pass over ``rows``, run as ``padded``, that decided the first ``kept`` cells."""
        self._reached *= _KEPT
        self._failed *= _KEPT
        self._reached[1 : kept + (kept < rows)] += 1
        if kept < rows:
            self._failed[kept] += 1
        self._learn_guesses(rows, kept)
        if padded >= len(self._passes):
            wider = padded + 1 - len(self._passes)
            self._passes = np.pad(self._passes, (0, wider))
            self._quickest = np.pad(self._quickest, (0, wider), constant_values=np.inf)
        self._passes *= _KEPT
        self._passes[padded] += 1
        self._quickest[padded] = min(seconds, _SLOWER * self._quickest[padded])

    def _learn_guesses(self, rows: int, kept: int) -> None:
        last = min(kept, rows - 1)  # guess that says something
        drawn = min(last, self._drawn)
        self._wrong *= _LEARNED
        self._guesses *= _LEARNED
        self._guesses += last - drawn, drawn
        if kept < rows:
            self._wrong[int(kept <= self._drawn)] += 1
        self._decided = _KEPT * self._decided + kept
        self._drawn = rows - kept

    def _ahead(self) -> float:
        """What a cell is worth, in decided ones, that a pass draws for the first time and does not decide.

        As far as it is known: a standard error is taken off.
        """
        usual = (self._wrong.sum() + _REJECTED) / (self._guesses.sum() + 1)
        fresh, drawn = (self._wrong + usual) / (self._guesses + 1)
        error = np.sqrt(usual * (1 - usual) * (1 / (self._guesses + 1)).sum())
        return float(max(0.0, _AHEAD * (fresh - drawn - error)) * self._decided / self._passes.sum())

    def _costs(self) -> tuple[float, float]:
        """Seconds of a pass without rows, and of a row."""
        seen = np.flatnonzero(self._passes)
        # by themselves passes of fewer rows take no longer, and those of twice the rows at most twice as long
        quickest = np.minimum.accumulate(self._quickest[seen] / seen) * seen
        quickest = np.minimum.accumulate(quickest[::-1])[::-1]
        passes = self._passes[seen]
        count = passes.sum()
        weights = passes / count
        rows, seconds = float(weights @ seen), float(weights @ quickest)
        away, doubt = seen - rows, _SPREAD / count
        row = (float(weights @ (away * quickest)) + doubt * seconds / (rows + _FIRST)) / (
            float(weights @ away**2) + doubt
        )
        row = min(max(row, 0.0), seconds / rows)
        return seconds - row * rows, row

    def _survival(self) -> NDArray[np.float64]:
        """Share of windows whose cells up to each offset are decided."""
        usual = (self._failed.sum() + _REJECTED) / (self._reached.sum() + 1)
        survival: NDArray[np.float64] = (1 - (self._failed + usual) / (self._reached + 1)).cumprod()
        return survival


def decided_by(guesses: Int, drawn: Int) -> int:
    """Tokens [n] that what was drawn behind guesses decides: up to the first that was guessed wrong."""
    wrong = drawn[:-1] != guesses[:-1]
    return int(wrong.argmax()) + 1 if wrong.any() else len(guesses)
