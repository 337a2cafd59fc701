"""Brute-force simulator of diagonal decoding.

It walks step by step over all cells with nothing but the definition "cell (t, i, j), counted from 1, is
decoded at step (t-1)d + (i-1)k + j" and the state "which tokens are known, which are fed". It uses no closed
form, no array and nothing of ``diagd.schedule`` except the description of a stream and the names of seeds.
"""

from __future__ import annotations

from collections.abc import Iterator

from diagd.schedule import RowSeed, StreamLayout
from tests.oracles.rows import Row

Cell = tuple[int, int, int]


class Simulator:
    """Decodes ``frames`` frames behind ``first_frame`` known ones; ``steps`` yields the rows of each pass."""

    def __init__(
        self,
        layout: StreamLayout,
        k: int,
        d: int,
        row_seed: RowSeed,
        refeed: bool,
        first_frame: int,
        frames: int,
        fed: int,
    ) -> None:
        self.layout, self.k, self.d, self.row_seed, self.refeed = layout, k, d, row_seed, refeed
        self.first_frame, self.frames = first_frame, frames
        self.cell_at = self._raster()
        self.position_of = {cell: position for position, cell in enumerate(self.cell_at) if cell}
        self.undecoded = {cell for cell in self.position_of if cell[0] >= first_frame}
        self.fed = set(range(fed))

    def _raster(self) -> list[Cell | None]:
        """The stream token by token: its cell, or None where it holds no visual token."""
        order: list[Cell | None] = [None] * self.layout.prefix
        for t in range(self.first_frame + self.frames):
            order += [None] * self.layout.before
            order += [(t, i, j) for i in range(self.layout.rows) for j in range(self.layout.columns)]
            order += [None] * self.layout.after
        return order

    def step_of(self, cell: Cell) -> int:
        """Step of a cell by the definition, the first one numbered 1."""
        t, i, j = cell[0] - self.first_frame + 1, cell[1] + 1, cell[2] + 1
        return (t - 1) * self.d + (i - 1) * self.k + j

    def is_known(self, position: int) -> bool:
        """Whether the token at a position is given or decoded in an earlier step."""
        return self.cell_at[position] not in self.undecoded

    def steps(self) -> Iterator[list[Row]]:
        """Rows of each pass, by position, until every cell is decoded."""
        number = 0
        newest: set[int] = set()
        while self.undecoded:
            number += 1
            due = {cell for cell in self.undecoded if self.step_of(cell) == number}
            rows = [self._query(cell) for cell in due]
            rows += self._given_rows(rows)
            rows += self._newest_rows(newest, rows)
            self.fed |= {row.position for row in rows if row.source == row.position}
            self.undecoded -= due
            newest = {self.position_of[cell] for cell in due}
            yield sorted(rows, key=lambda row: row.position)

    def _query(self, cell: Cell) -> Row:
        sink = self.position_of[cell]
        before = sink - 1
        return Row(before if self.is_known(before) else self._seed(cell), before, sink)

    def _seed(self, cell: Cell) -> int:
        """Position of the stand-in for the undecoded raster predecessor of a row start."""
        t, i, j = cell
        assert j == 0
        missing_frame, missing_row = (t, i - 1) if i > 0 else (t - 1, self.layout.rows - 1)
        last = self.layout.columns - 1
        if self.row_seed is RowSeed.PROMPT:
            return self.position_of[0, missing_row, last]
        if self.row_seed is RowSeed.PREVIOUS_FRAME:
            frame = missing_frame - 1
            while (frame, missing_row, last) in self.undecoded:
                frame -= 1
            return self.position_of[frame, missing_row, last]
        done = [
            column for column in range(last + 1) if (missing_frame, missing_row, column) not in self.undecoded
        ]
        column = 0 if self.row_seed is RowSeed.ABOVE else max(done)
        assert column in done
        return self.position_of[missing_frame, missing_row, column]

    def _given_rows(self, queries: list[Row]) -> list[Row]:
        """Given tokens not fed so far that stand in front of a frame which starts now."""
        starts = [row for row in queries if self._starts_frame(row.sink)]
        given = {position for row in starts for position in range(row.position) if self._is_given(position)}
        return [Row(position, position, -1) for position in given - self.fed]

    def _starts_frame(self, position: int) -> bool:
        cell = self.cell_at[position]
        return cell is not None and cell[1:] == (0, 0)

    def _is_given(self, position: int) -> bool:
        cell = self.cell_at[position]
        return cell is None or cell[0] < self.first_frame

    def _newest_rows(self, newest: set[int], rows: list[Row]) -> list[Row]:
        """Tokens decoded by the step before that no query feeds.

        All of them with ``refeed``; otherwise only one that is followed by given tokens fed in this step.
        """
        taken = {row.position for row in rows}
        return [
            Row(position, position, -1)
            for position in newest - taken
            if self.refeed or (position + 1 in taken and self.cell_at[position + 1] is None)
        ]


def split_first_pass(steps: list[list[Row]], max_width: int) -> list[list[Row]]:
    """Feed the rows of the first pass in several of at most ``max_width``; the later ones are full."""
    waiting = list(steps[0])
    chunks: list[list[Row]] = []
    while waiting:
        chunks.insert(0, waiting[-max_width:])
        del waiting[-max_width:]
    return chunks + steps[1:]
