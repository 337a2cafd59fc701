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
_OUTLIER: Final = 3.0  # times the cost expected: more was something else on the machine


class WindowPolicy:
    """The window that decides most cells a second.

    A pass costs a part that does not depend on its rows and one for each; both are fitted to the passes so
    far. A cell at offset j of a window comes out right if all those before it do: the share of windows that
    get so far is the product of what was right at each offset among those that reached it (Kaplan and Meier).
    All figures fade, so that a world that changes, or a window that became short, is tried again. A window of
    one row is next-token prediction: where drafts do not pay, that is what is left.

    Args:
        cells: most rows that are of use.
    """

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self._reached: NDArray[np.float64] = np.zeros(cells)
        self._failed: NDArray[np.float64] = np.zeros(cells)
        self._sums: NDArray[np.float64] = np.zeros(5)  # of 1, rows, seconds, rows^2, rows * seconds

    def choose(self, padded: Int) -> int:
        """Rows of the next window, at most ``len(padded)``, of which n are run as ``padded[n - 1]``."""
        if not self._sums[0]:
            return min(_FIRST, len(padded))
        cost, row = self._costs()
        rate = self._survival()[: len(padded)].cumsum() / (cost + row * padded)
        return int(rate.argmax()) + 1

    def add(self, rows: int, kept: int, padded: int, seconds: float) -> None:
        """Learn of a pass over ``rows``, run as ``padded``, that decided the first ``kept`` cells."""
        self._reached *= _KEPT
        self._failed *= _KEPT
        self._reached[1 : kept + (kept < rows)] += 1
        if kept < rows:
            self._failed[kept] += 1
        if self._sums[0]:
            cost, row = self._costs()
            seconds = min(seconds, _OUTLIER * (cost + row * padded))
        self._sums = _KEPT * self._sums + (1, padded, seconds, padded**2, padded * seconds)

    def _costs(self) -> tuple[float, float]:
        """Seconds of a pass without rows, and of a row."""
        rows, seconds, squares, products = (self._sums[1:] / self._sums[0]).tolist()
        usual = seconds / (rows + _FIRST)
        doubt = _SPREAD / self._sums[0]
        row = (products - rows * seconds + doubt * usual) / (squares - rows**2 + doubt)
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
