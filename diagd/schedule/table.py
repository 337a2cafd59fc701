"""Compiled steps: which token is fed where, and which cell its prediction fills."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Int: TypeAlias = NDArray[np.integer[Any]]
Int32: TypeAlias = NDArray[np.int32]

NO_SINK = -1


class Step(NamedTuple):
    """One forward pass, in slot order.

    Attributes:
        sources: [W], stream position of the token whose id is fed.
        positions: [W], raster position at which it is fed.
        sinks: [W], position of the cell its prediction fills, or ``NO_SINK``.
        transient: bool [W], rows hidden from every later query once the step has run: guesses.
    """

    sources: Int
    positions: Int
    sinks: Int
    transient: NDArray[np.bool_]

    @property
    def width(self) -> int:
        """Number of fed tokens."""
        return len(self.positions)


@dataclass(frozen=True, eq=False)
class Shape:
    """What stays of a block where its steps are shifted: worked out once, whatever the number of frames.

    Attributes (int32):
        offsets: [steps + 1], where the rows of each step begin.
        widths: [steps], rows of each.
        decoding: [D], rows that predict a cell.
        decoded: [D], the same, counted from the first row of their step.
        draws: [steps + 1], where those of each step begin.
        changed: [C], rows whose slots change, step by step: the guesses of the step before, then its own.
        hides: [H], where in these the guesses stand.
        changes: [steps + 1], where those of each step begin.
        guesses: rows that are hidden once their step has run.
        last_guesses: those of the last step, to be hidden ahead of the next block.
    """

    offsets: Int32
    widths: Int32
    decoding: Int32
    decoded: Int32
    draws: Int32
    changed: Int32
    hides: Int32
    changes: Int32
    guesses: Int32
    last_guesses: Int32

    @classmethod
    def of(cls, offsets: Int, decodes: NDArray[np.bool_], transient: NDArray[np.bool_]) -> Shape:
        """Of steps with rows at ``offsets``; bool [rows] say which of them decode a cell and which guess."""
        starts, widths = _int32(offsets), _int32(np.diff(offsets))
        rows, step = np.arange(starts[-1], dtype=np.int32), np.repeat(np.arange(len(widths)), widths)
        decoding, guesses = _int32(np.flatnonzero(decodes)), _int32(np.flatnonzero(transient))
        last = step[guesses] == len(widths) - 1
        hidden = guesses[~last]
        when = np.concatenate([step[hidden] + 1, step])
        order = np.argsort(when, kind="stable")
        return cls(
            starts,
            widths,
            decoding,
            decoding - starts[step[decoding]],
            _int32(np.searchsorted(decoding, starts)),
            np.concatenate([hidden, rows])[order],
            _int32(np.flatnonzero(order < len(hidden))),
            _int32(np.searchsorted(when[order], np.arange(len(starts)))),
            guesses,
            guesses[last],
        )


def _int32(numbers: Int) -> Int32:
    return numbers.astype(np.int32)


@dataclass(frozen=True, eq=False)
class Block:
    """Steps that do not depend on a look at each other's results; rows of step n: offsets[n]:offsets[n+1].

    Attributes:
        offsets: int [steps + 1].
        sources, positions, sinks, transient: of all steps, one after another; see ``Step``.
        commit: predictions become the stream's tokens. Else the decoder looks at them and decides.
        pause: steps after which the decoder is asked again, as where a frame is complete; those that are left
            run once there is more to do. 0: all.
        pinned: bool [W], sources that stay where they are where the block is shifted; None: none.
    """

    offsets: Int
    sources: Int
    positions: Int
    sinks: Int
    transient: NDArray[np.bool_]
    commit: bool = True
    pause: int = 0
    pinned: NDArray[np.bool_] | None = None

    @property
    def steps(self) -> int:
        """Number of forward passes."""
        return len(self.offsets) - 1

    @property
    def widths(self) -> Int:
        """Int [steps], tokens fed by each step."""
        return np.diff(self.offsets)

    @cached_property
    def shape(self) -> Shape:
        """What all shifts of the block have in common."""
        return Shape.of(self.offsets, self.sinks != NO_SINK, self.transient)

    @cached_property
    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources, positions and sinks, int64 [3, rows], and 1 where they move with the block."""
        numbers = np.stack([self.sources, self.positions, self.sinks]).astype(np.int64)
        moves = (numbers != NO_SINK).astype(np.int64)
        if self.pinned is not None:
            moves[0, self.pinned] = 0
        return numbers, moves

    def step(self, index: int) -> Step:
        """Views of one step."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Step(self.sources[rows], self.positions[rows], self.sinks[rows], self.transient[rows])


@dataclass(frozen=True, eq=False)
class Table(Block):
    """The steps of a run of frames.

    Attributes:
        frame_starts: int32 [frames], step that decodes cell (0, 0) of each frame.
    """

    frame_starts: Int = field(kw_only=True)

    def block(self, first: int, last: int) -> Block:
        """Steps [first, last), which may run without a look at their results."""
        rows = slice(int(self.offsets[first]), int(self.offsets[last]))
        offsets = self.offsets[first : last + 1] - self.offsets[first]
        return Block(
            offsets, self.sources[rows], self.positions[rows], self.sinks[rows], self.transient[rows]
        )


def feed(positions: Int, width: int) -> Block:
    """A block that only feeds known tokens into the cache, in passes of at most ``width``."""
    starts = np.arange(0, len(positions), width, dtype=np.int64)
    offsets = np.append(starts, len(positions))
    no_sinks = np.full(len(positions), NO_SINK, np.int64)
    return Block(offsets, positions, positions, no_sinks, np.zeros(len(positions), np.bool_))


def predicting(first: int, last: int, start: int, *, commit: bool = True) -> Block:
    """One pass of rows [first, last) in raster order; each from ``start`` on predicts the token behind it."""
    positions = np.arange(first, last)
    sinks = np.where(positions < start, NO_SINK, positions + 1)
    offsets, transient = np.array([0, len(positions)]), np.zeros(len(positions), np.bool_)
    return Block(offsets, positions, positions, sinks, transient, commit=commit)


def shifted(block: Block, by: int) -> Block:
    """The same steps ``by`` positions further on in the stream; pinned sources stay where they are."""
    numbers, moves = block.places
    moved = numbers + moves * by
    other = Block(*(block.offsets, *moved, block.transient, block.commit, block.pause, block.pinned))
    other.__dict__["shape"] = block.shape  # the cached property
    return other
