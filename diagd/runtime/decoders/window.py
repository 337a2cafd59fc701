"""How many rows a pass verifies: chosen by what a pass costs, and by how many of its cells come out right."""

from __future__ import annotations

import math
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Int

_KEPT: Final = 0.98  # of what was seen, a pass later: a few frames are remembered
_FIRST: Final = 32  # rows, while nothing is known; also how many rows cost as much as a pass without any
_SPREAD: Final = 25.0  # rows^2 over which widths must have spread to say what a row costs
_REJECTED: Final = 0.05  # share of cells, while nothing is known
_AHEAD: Final = 0.7  # of what it is worth to draw a cell ahead of its turn: further passes would do so too
_LEARNED: Final = 0.999  # of how often guesses were wrong, a pass later
_OFTEN: Final = 8  # passes after which all is fitted anew
_LARGE: Final = 1e6  # unit at which sums are written anew
_SLOWER: Final = 1.1  # times what the quickest pass of a width took: what the next one counts as at most

Float64: TypeAlias = NDArray[np.float64]


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
        self._unit = 1.0  # what a pass counts, more than those before it
        self._count = 0
        self._reached: Float64 = np.zeros(cells)
        self._failed: Float64 = np.zeros(cells)
        self._wrong, self._guesses = [0.0, 0.0], [0.0, 0.0]  # that no pass had drawn, that one had
        self._drawn = 0  # cells of the next window that the last one drew
        self._decided = 0.0
        self._passes: Float64 = np.zeros(0)  # by the rows that they are run as
        self._quickest: Float64 = np.zeros(0)  # seconds

    def choose(self, padded: Int) -> int:
        """Rows of the next window, at most ``len(padded)``, of which n are run as ``padded[n - 1]``."""
        if not self._count:
            return min(_FIRST, len(padded))
        if self._count <= _OFTEN or self._count % _OFTEN == 0:
            self._fitted = self._fit()
        (cost, row), decided, ahead = self._fitted
        drawn = ahead[self._drawn - 1] if self._drawn else 0.0
        worth = decided[: len(padded)] + np.maximum(ahead[: len(padded)] - drawn, 0.0)
        return int((worth / (cost + row * padded)).argmax()) + 1

    def add(self, rows: int, kept: int, padded: int, seconds: float) -> None:
        """Learn of a pass over ``rows``, run as ``padded``, that decided the first ``kept`` cells."""
        self._count += 1
        self._unit /= _KEPT
        if self._unit > _LARGE:
            self._reached /= self._unit
            self._failed /= self._unit
            self._passes /= self._unit
            self._decided, self._unit = self._decided / self._unit, 1.0
        self._reached[1 : kept + (kept < rows)] += self._unit
        if kept < rows:
            self._failed[kept] += self._unit
        self._decided += kept * self._unit
        self._learn_guesses(rows, kept)
        if padded >= len(self._passes):
            wider = padded + 1 - len(self._passes)
            self._passes = np.pad(self._passes, (0, wider))
            self._quickest = np.pad(self._quickest, (0, wider), constant_values=np.inf)
        self._passes[padded] += self._unit
        self._quickest[padded] = min(seconds, _SLOWER * self._quickest[padded])

    def _learn_guesses(self, rows: int, kept: int) -> None:
        last = min(kept, rows - 1)  # guess that says something
        drawn = min(last, self._drawn)
        for kind, guesses in enumerate((last - drawn, drawn)):
            self._guesses[kind] = _LEARNED * self._guesses[kind] + guesses
            self._wrong[kind] *= _LEARNED
        if kept < rows:
            self._wrong[int(kept <= self._drawn)] += 1
        self._drawn = rows - kept

    def _fit(self) -> tuple[tuple[float, float], Float64, Float64]:
        """What a pass costs, and sums over windows [cells] of what their cells are worth, drawn or not."""
        survival = self._survival()
        return self._costs(), survival.cumsum(), (self._ahead() * (1 - survival)).cumsum()

    def _ahead(self) -> float:
        """What a cell is worth, in decided ones, that a pass draws for the first time and does not decide.

        As far as it is known: a standard error is taken off.
        """
        usual = (sum(self._wrong) + _REJECTED) / (sum(self._guesses) + 1)
        pairs = zip(self._wrong, self._guesses, strict=True)
        fresh, drawn = ((wrong + usual) / (guesses + 1) for wrong, guesses in pairs)
        error = math.sqrt(usual * (1 - usual) * sum(1 / (guesses + 1) for guesses in self._guesses))
        return max(0.0, _AHEAD * (fresh - drawn - error)) * self._decided / float(self._passes.sum())

    def _costs(self) -> tuple[float, float]:
        """Seconds of a pass without rows, and of a row."""
        seen = np.flatnonzero(self._passes)
        # by themselves passes of fewer rows take no longer, and those of twice the rows at most twice as long
        quickest = np.minimum.accumulate(self._quickest[seen] / seen) * seen
        quickest = np.minimum.accumulate(quickest[::-1])[::-1]
        count = float(self._passes.sum())
        weights = self._passes[seen] / count
        rows, seconds = float(weights @ seen), float(weights @ quickest)
        away, doubt = seen - rows, _SPREAD * self._unit / count
        row = (float(weights @ (away * quickest)) + doubt * seconds / (rows + _FIRST)) / (
            float(weights @ away**2) + doubt
        )
        row = min(max(row, 0.0), seconds / rows)
        return seconds - row * rows, row

    def _survival(self) -> Float64:
        """Share of windows whose cells up to each offset are decided."""
        unit = self._unit
        usual = (self._failed.sum() + _REJECTED * unit) / (self._reached.sum() + unit)
        survival: Float64 = (1 - (self._failed + usual * unit) / (self._reached + unit)).cumprod()
        return survival


def decided_by(guesses: Int, drawn: Int) -> int:
    """Tokens [n] that what was drawn behind guesses decides: up to the first that was guessed wrong."""
    wrong = drawn[:-1] != guesses[:-1]
    return int(wrong.argmax()) + 1 if wrong.any() else len(guesses)
