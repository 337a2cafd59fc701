"""Compiles (layout, k, d, row seed, refeed) into tables. Nothing else derives a schedule.

Cell (t, i, j), all from 0, is decoded at step t*d + i*k + j by feeding the token at its raster predecessor
(arXiv 2503.14070, section 3). A frame's rows are the same for every frame up to a shift, so they are
built by broadcasting over frames.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagd.errors import ScheduleError, expect
from diagd.schedule.layout import RowSeed, StreamLayout
from diagd.schedule.table import NO_SINK, Block, Table, shifted

Rows = NDArray[np.int64]
"""int64 [..., 4]: step, source, position, sink."""

_ROWS: Final = 16
"""Reading the weights bounds a step of so many rows as it does one of 1; widths are multiples of it."""

_WIDEST: Final = 64
"""Enough for most models' widest step, and to feed a prompt in few passes."""

_NEXT = "next token"
_NUMBER = "([0-9]{1,9})"
_WORDS = {
    "k": f"k={_NUMBER}",
    "d": f"(serial|chained)|d={_NUMBER}",
    "row_seed": f"seeds=({'|'.join(seed.value for seed in RowSeed)})",
    "refeed": "(no-refeed)",
    "keep_seeds": "(keep-seeds)",
}
"""How each part of a schedule is spelled."""


@dataclass(frozen=True)
class Schedule:
    """A decoding order: next-token prediction, diagonal, serial or chained frames.

    Attributes:
        layout: the token stream.
        k: steps between the starts of neighbouring rows.
        d: steps between the starts of neighbouring frames.
        row_seed: stand-in for a row's missing predecessor.
        refeed: feed the true predecessor at its position once it is decoded.
        keep_seeds: leave the K/V rows of seeds visible after their step, as the released code does.

    Raises:
        ScheduleError: the lags cannot be decoded, or ``refeed`` and ``keep_seeds`` contradict each other.
    """

    layout: StreamLayout
    k: int
    d: int
    row_seed: RowSeed = RowSeed.PREVIOUS_FRAME
    refeed: bool = True
    keep_seeds: bool = False

    def __post_init__(self) -> None:
        expect(Schedule, vars(self))
        columns, low, high = self.layout.columns, self.layout.chained_lag(self.k), self.steps_per_frame
        if not 1 <= self.k <= columns:
            raise ScheduleError(
                f"row lag k={self.k} is outside 1..{columns}: a row needs at least one cell of the row "
                f"above, and has them all at k={columns} (next-token prediction); choose k in 1..{columns}"
            )
        if self.d < low:
            raise ScheduleError(
                f"frame lag d={self.d} is below k*rows = {low}: the next frame would overtake the last row "
                f"of this one; choose d in {low} (chained) .. {high} (serial)"
            )
        if self.d > high:
            raise ScheduleError(
                f"frame lag d={self.d} is above the {high} steps of a frame at k={self.k}: the surplus steps "
                f"would decode nothing; choose d in {low} (chained) .. {high} (serial)"
            )
        if self.refeed and self.keep_seeds:
            raise ScheduleError(
                "refeed feeds the true token at the position of a seed, so the seed cannot be kept; "
                "set refeed=False or keep_seeds=False"
            )

    @classmethod
    def next_token(cls, layout: StreamLayout) -> Schedule:
        """Raster order, one cell a step."""
        expect(cls.next_token, locals())
        return cls(layout, k=layout.columns, d=layout.cells)

    @classmethod
    def serial(cls, layout: StreamLayout, k: int, row_seed: RowSeed = RowSeed.PREVIOUS_FRAME) -> Schedule:
        """Diagonal inside a frame, frames strictly one after another."""
        expect(cls.serial, locals())
        return cls(layout, k, layout.steps_per_frame(k), row_seed)

    @classmethod
    def chained(cls, layout: StreamLayout, k: int, row_seed: RowSeed = RowSeed.PREVIOUS_FRAME) -> Schedule:
        """Diagonal across frames: the first row of a frame follows the last row of the frame before."""
        expect(cls.chained, locals())
        return cls(layout, k, layout.chained_lag(k), row_seed)

    @classmethod
    def parse(cls, spelling: str, layout: StreamLayout, default: Schedule | None = None) -> Schedule:
        """The schedule that a spelling names: words between spaces or commas, as `name` writes them.

        ``next token`` or ``ntp``; or a row lag ``k=2`` and a frame lag, which is ``serial`` (frames one
        after another), ``chained`` (the next frame follows row by row) or a number of steps, as in ``d=15``.
        Either may be followed by ``seeds=above`` (a row seed), ``no-refeed`` and ``keep-seeds``. What is not
        spelled is that of ``default`` (k=1, serial), but for the frame lag where a row lag is.

        Raises:
            ScheduleError: it is no spelling, or its lags cannot be decoded.
        """
        expect(cls.parse, locals())
        words, base = _words(spelling, layout.columns), default or cls.serial(layout, 1)
        k = int(words.get("k", base.k))
        d = words.get("d", "serial" if "k" in words else str(base.d))
        lags = {"serial": layout.steps_per_frame(k), "chained": layout.chained_lag(k)}
        return cls(
            layout,
            k,
            lags[d] if d in lags else int(d),
            RowSeed(words.get("row_seed", base.row_seed)),
            base.refeed and "refeed" not in words,
            base.keep_seeds or "keep_seeds" in words,
        )

    @property
    def name(self) -> str:
        """What people call it, and the only spelling of an order: ``k=1 chained``, ``next token``."""
        kinds = {self.steps_per_frame: "serial", self.layout.chained_lag(self.k): "chained"}
        lags = f"k={self.k} {kinds.get(self.d, f'd={self.d}')}"
        words = {
            _NEXT if self.is_next_token else lags: True,
            f"seeds={self.row_seed.value}": self.row_seed is not RowSeed.PREVIOUS_FRAME,
            "no-refeed": not self.refeed,
            "keep-seeds": self.keep_seeds,
        }
        return " ".join(word for word, is_said in words.items() if is_said)

    @property
    def is_next_token(self) -> bool:
        """Whether it is raster order, one cell a step."""
        return self.k == self.layout.columns

    @property
    def steps_per_frame(self) -> int:
        """Steps from the first to the last cell of one frame."""
        return self.layout.steps_per_frame(self.k)

    @property
    def overlaps(self) -> bool:
        """Whether a frame begins before the one ahead of it is complete."""
        return self.d < self.steps_per_frame

    @property
    def frames_in_flight(self) -> int:
        """Most frames under way at once."""
        return self.steps_per_frame // self.d + 1

    @property
    def widest_step(self) -> int:
        """Most rows of a step that decodes; passes that feed a prompt may be wider."""
        return _widest(self)

    def total_steps(self, frames: int) -> int:
        """Steps that decode ``frames`` frames behind a prompt that fits in one pass; 0 for no frame."""
        return self.steps_per_frame + (frames - 1) * self.d if frames else 0

    def table(self, first_frame: int, frames: int, fed: int, max_width: int | None = None) -> Table:
        """Compile the steps that decode ``frames`` frames from ``first_frame`` on.

        Args:
            first_frame: index of the first frame to decode; all earlier frames are known.
            frames: how many.
            fed: positions below this one are in the cache already; the rest of the known tokens is fed
                ahead, together with the first step.
            max_width: widest pass allowed for feeding known tokens; they are split into that many passes.

        Raises:
            ScheduleError: no frame precedes ``first_frame``, ``fed`` lies beyond the known tokens, or
                ``max_width`` is below 1.
        """
        expect(Schedule.table, locals())
        start = self.layout.first_cell(first_frame)
        if first_frame < 1 or frames < 1:
            raise ScheduleError(
                f"decoding needs at least one known frame and one to decode, got first_frame={first_frame}, "
                f"frames={frames}; give a prompt of one frame or more"
            )
        if not 0 <= fed < start:
            raise ScheduleError(f"{fed} positions are said to be fed, expected 0..{start - 1}")
        last = self.total_steps(frames) - 1
        parts = [
            self._known(fed, start),
            self._queries(first_frame, frames),
            self._gaps(first_frame, frames),
            self._row_ends(first_frame, frames),
        ]
        rows = np.concatenate([part.reshape(-1, 4) for part in parts])
        rows = rows[rows[:, 0] <= last]
        chunks = _split_first_step(rows, max_width)
        rows = rows[np.lexsort((rows[:, 2], rows[:, 0]))]
        offsets = np.searchsorted(rows[:, 0], np.arange(-chunks, last + 2)).astype(np.int32)
        sources, positions, sinks = (np.ascontiguousarray(rows[:, c], dtype=np.int32) for c in (1, 2, 3))
        starts = chunks + np.arange(frames, dtype=np.int32) * np.int32(self.d)
        guesses = np.zeros(len(rows), np.bool_) if self.keep_seeds else sources != positions
        return Table(offsets, sources, positions, sinks, guesses, frame_starts=starts)

    def block(
        self, origin: int, begun: int, steps: tuple[int, int], pause: int, unfed: int, max_width: int
    ) -> Block:
        """Some steps of a flight: frames decoded one after another, or overlapping, from ``origin`` on.

        The rows of all frames are equal up to a shift once as many frames have begun as are ever under way at
        once, so a block of a flight without end is compiled for one of its first frames and shifted.

        Args:
            origin: first frame of the flight; all earlier frames are known.
            begun: frames of the flight that have begun; rows of later ones are left out.
            steps: first step and one past the last, counted from the first decoding step of the flight; a
                negative first step stands for all passes that feed known tokens ahead of it.
            pause: step ahead of which the block pauses, if it has it.
            unfed: known tokens that are not in the cache when the flight begins; at least 1.
            max_width: widest pass allowed for feeding known tokens.
        """
        first, last = steps
        steady = self.frames_in_flight + 1
        skipped = max(0, (first - self.steps_per_frame) // self.d + 1 - steady)
        begun, first, last = begun - skipped, first - skipped * self.d, last - skipped * self.d
        start = self.layout.first_cell(1)
        unfed = unfed if first < 0 else 1  # later blocks do not depend on it
        frame = 1 + max(0, -(-(unfed - start) // self.layout.frame_length))
        pause -= skipped * self.d
        block = _compiled(self, frame, begun, unfed, max_width, (first, last), last - pause)
        shift = (origin + skipped - frame) * self.layout.frame_length
        return shifted(block, shift)

    @staticmethod
    def _known(fed: int, start: int) -> Rows:
        """Feed-only rows of the known tokens at fed..start-2; the one at start-1 decodes the first cell."""
        positions = np.arange(fed, start - 1)
        return _rows(np.zeros_like(positions), positions, positions, np.full_like(positions, NO_SINK))

    def _queries(self, first_frame: int, frames: int) -> Rows:
        """The rows that decode cells, [frames, cells, 4]."""
        layout, cell = self.layout, np.arange(self.layout.cells)
        frame = np.arange(frames)[:, None]
        steps = frame * self.d + cell // layout.columns * self.k + cell % layout.columns
        sinks = layout.first_cell(first_frame) + frame * layout.frame_length + cell
        sources = sinks - 1
        if self.k < layout.columns and layout.rows > 1:
            starts = cell[layout.columns :: layout.columns]
            sources[:, starts] = self._seed_sources(first_frame, frame, starts)
        if layout.gap == 0 and self.overlaps:  # a frame start is seeded like a row's
            sources[1:, 0] = self._seed_sources(first_frame, frame[1:], cell[:1])[:, 0]
        return _rows(steps, sources, sinks - 1, sinks)

    def _seed_sources(self, first_frame: int, frame: Rows, starts: Rows) -> Rows:
        """Positions fed in place of the undecoded predecessors of the cells ``starts``, [frames, starts].

        A frame start counts as the row below the last row of the frame before.
        """
        layout = self.layout
        own = layout.first_cell(first_frame) + frame * layout.frame_length
        at_frame_start = starts[0] == 0
        row_above = (
            own - layout.frame_length + layout.cells - layout.columns
            if at_frame_start
            else own + starts - layout.columns
        )
        lead = self.d - (layout.rows - 1) * self.k if at_frame_start else self.k
        if self.row_seed is RowSeed.ABOVE:
            return row_above
        if self.row_seed is RowSeed.DUPLICATE:
            return row_above + min(layout.columns, lead) - 1
        row_end = (starts - 1) % layout.cells
        if self.row_seed is RowSeed.PROMPT:
            return row_above * 0 + layout.first_cell(0) + row_end
        wait = self.steps_per_frame - 1 if at_frame_start else layout.columns - 1 - self.k
        frames_back: Rows = np.minimum(max(1, wait // self.d + 1), frame + 1)
        return own - frames_back * layout.frame_length + row_end

    def _gaps(self, first_frame: int, frames: int) -> Rows:
        """The known tokens between two frames, fed with the first step of the later one."""
        layout = self.layout
        frame = np.arange(1, frames)[:, None]
        back = np.arange(-layout.gap, -1)
        positions = layout.first_cell(first_frame) + frame * layout.frame_length + back
        steps = np.broadcast_to(frame * self.d, positions.shape)
        return _rows(steps, positions, positions, np.full_like(positions, NO_SINK))

    def _row_ends(self, first_frame: int, frames: int) -> Rows:
        """Last tokens of rows, fed at the step after they are decoded where no query feeds them."""
        layout = self.layout
        row = np.arange(layout.rows)
        is_last = row == layout.rows - 1
        inner = np.full(layout.rows, self.refeed and self.k < layout.columns)
        fed = np.where(is_last, self.refeed if self.overlaps else layout.gap > 0, inner)
        frame, row = np.arange(frames)[:, None], row[fed.astype(bool)]
        start = layout.first_cell(first_frame) + frame * layout.frame_length
        positions = start + (row + 1) * layout.columns - 1
        steps = frame * self.d + row * self.k + layout.columns
        return _rows(steps, positions, positions, np.full_like(positions, NO_SINK))


@lru_cache(maxsize=64)
def _widest(schedule: Schedule) -> int:
    fed = schedule.layout.first_cell(1) - 1
    return int(schedule.table(1, schedule.frames_in_flight + 1, fed).widths.max())


@lru_cache(maxsize=64)
def _compiled(
    schedule: Schedule, frame: int, frames: int, unfed: int, max_width: int, steps: tuple[int, int], left: int
) -> Block:
    """Some steps of a flight from ``frame`` on, with a pause ahead of the last ``left``."""
    first, last = steps
    fed = schedule.layout.first_cell(frame) - unfed
    table = schedule.table(frame, frames, fed, max_width)
    ahead = int(table.frame_starts[0])
    block = table.block(0 if first < 0 else ahead + first, ahead + last)
    pinned = block.sources != block.positions if schedule.row_seed is RowSeed.PROMPT else None
    return replace(block, pause=block.steps - left if left > 0 else 0, pinned=pinned)


def _words(spelling: str, columns: int) -> dict[str, str]:
    """What a spelling says of each part of a schedule."""
    found: dict[str, str] = {}
    spelt = re.sub(rf"{_NEXT}|\bntp\b", f"k={columns}", spelling.replace(",", " "))
    for word in spelt.split():
        part, match = next(
            ((part, match) for part, text in _WORDS.items() if (match := re.fullmatch(text, word))),
            (word, None),
        )
        if match is None or part in found:
            break
        found[part] = next(filter(None, match.groups()))
    else:
        if found:
            return found
    raise ScheduleError(
        f"order '{spelling}': expected '{_NEXT}', or k=N with serial, chained or d=N, such as 'k=1 "
        f"chained', and perhaps seeds={'|'.join(seed.value for seed in RowSeed)} or no-refeed"
    )


def _rows(steps: Rows, sources: Rows, positions: Rows, sinks: Rows) -> Rows:
    return np.stack(np.broadcast_arrays(steps, sources, positions, sinks), axis=-1)


def _split_first_step(rows: Rows, max_width: int | None) -> int:
    """Move the surplus of step 0, all known tokens, to earlier (negative) steps; returns how many."""
    if max_width is not None and max_width < 1:
        raise ScheduleError(f"a pass of max_width={max_width} tokens feeds nothing; choose 1 or more")
    first = np.flatnonzero(rows[:, 0] == 0)
    if max_width is None or len(first) <= max_width:
        return 0
    newest_first = first[np.argsort(-rows[first, 2])]
    chunk = np.arange(len(first)) // max_width
    rows[newest_first, 0] = -chunk
    return int(chunk[-1])


def default_widths(layout: StreamLayout) -> tuple[int, int]:
    """Widths of step graphs that decode every schedule of a model, k = 1 with chained frames included."""
    widest = Schedule.chained(layout, 1).widest_step
    return _ROWS, max(_WIDEST, -(-widest // _ROWS) * _ROWS)
