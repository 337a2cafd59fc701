"""What an action must do to the view, read off the tokens themselves.

The view follows the player, so a step onto free ground scrolls it by one tile and anything else leaves it in
place. Which tiles are free ground, and which ones may appear where, is learned from true recordings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diagd.schedule import StreamLayout
from diagd.tuning.recordings import TokenDataset
from worlds.simulator import ACTIONS, COLUMNS, ROWS, SCROLL, VIEW_ROWS

UNKNOWN_GEOMETRY = f"it is known for recordings of Crafter, {ROWS} x {COLUMNS} tiles: diagd world collect"

SHIFTS = ((0, 0), *SCROLL.values())
"""(rows, columns) the view may scroll by in one step; the first is standing still."""

PLAYER = (VIEW_ROWS // 2, COLUMNS // 2)
"""Cell of the view in which the player stands."""

MARGIN = 3
"""Tiles by which the expected scroll must differ from every other for a transition to count."""

Tokens = NDArray[np.integer]


@dataclass(frozen=True)
class Geometry:
    """Regularities of a recorded world.

    Attributes:
        is_ground: bool [codes], walking towards this tile scrolls the view.
        allowed: bool [rows, codes], this code occurs in this row of true frames.
    """

    is_ground: NDArray[np.bool_]
    allowed: NDArray[np.bool_]

    @classmethod
    def learn(cls, recording: TokenDataset, codes: int) -> Geometry:
        """Learn from true episodes; a tile is ground if most walks towards it scroll the view."""
        walks, scrolled = np.zeros(codes), np.zeros(codes)
        allowed = np.zeros((ROWS, codes), bool)
        for start, end in zip(recording.starts[:-1], recording.starts[1:], strict=True):
            stream = recording.streams[start:end].astype(np.int64)
            frames, actions = stream[:, 1:].reshape(-1, ROWS, COLUMNS), stream[1:, 0] - codes
            for row in range(ROWS):
                allowed[row, np.unique(frames[:, row])] = True
            ahead, shift = _tile_ahead(frames[:-1], actions), _shift_of(actions)
            agreement = shift_agreement(frames[:-1], frames[1:])
            walked = np.flatnonzero(shift > 0)
            np.add.at(walks, ahead[walked], 1)
            np.add.at(scrolled, ahead[walked], agreement[walked, shift[walked]] > agreement[walked, 0])
        view = np.zeros_like(allowed)
        view[:VIEW_ROWS], view[VIEW_ROWS:] = allowed[:VIEW_ROWS].any(0), allowed[VIEW_ROWS:].any(0)
        return cls(2 * scrolled > walks, view)

    @staticmethod
    def is_known(layout: StreamLayout, actions: tuple[str, ...]) -> bool:
        """Whether a recording of this grid, under actions of these names, is one of Crafter."""
        return (layout.rows, layout.columns) == (ROWS, COLUMNS) and actions == ACTIONS

    def follows(self, before: Tokens, after: Tokens, actions: Tokens) -> Following:
        """Whether transitions [n, rows, columns] -> [n, rows, columns] follow actions [n]."""
        shift = _shift_of(actions)
        expected = np.where(self.is_ground[_tile_ahead(before, actions)], shift, 0)
        agreement = shift_agreement(before, after)
        rows = np.arange(len(expected))
        others = agreement.copy()
        others[rows, expected] = -1.0
        return Following(
            followed=agreement[rows, expected] > others.max(1),
            counts=_is_distinctive(before, expected),
            walks=expected > 0,
            agreement=agreement[rows, expected],
        )

    def invalid(self, frames: Tokens) -> NDArray[np.bool_]:
        """Cells [..., rows, columns] that show what true frames never show there."""
        rows = np.arange(ROWS)[:, None]
        return ~self.allowed[rows, frames]


@dataclass(frozen=True)
class Following:
    """Verdict on n transitions, arrays [n].

    Attributes:
        followed: the view moved in the direction and by the distance that the action demands.
        counts: the picture is varied enough to tell.
        walks: the action demands that the view scrolls.
        agreement: share of the tiles visible before and after that are where they should be.
    """

    followed: NDArray[np.bool_]
    counts: NDArray[np.bool_]
    walks: NDArray[np.bool_]
    agreement: NDArray[np.float64]


def shift_agreement(before: Tokens, after: Tokens) -> NDArray[np.float64]:
    """Share of overlapping view tiles that agree under each of `SHIFTS`, [n, 5]; the player is left out."""
    old, new = np.asarray(before)[:, :VIEW_ROWS], np.asarray(after)[:, :VIEW_ROWS]
    is_world = np.ones((VIEW_ROWS, COLUMNS), bool)
    is_world[PLAYER] = False
    scores = []
    for shift in SHIFTS:
        source, target = _overlap(shift)
        compared = is_world[source] & is_world[target]
        same = (old[(slice(None), *source)] == new[(slice(None), *target)]) & compared
        scores.append(same.sum((1, 2)) / compared.sum())
    return np.stack(scores, axis=1)


def _overlap(shift: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where the tiles seen both before and after lie before, and after."""
    before, after = [], []
    for step, size in zip(shift, (VIEW_ROWS, COLUMNS), strict=True):
        before.append(slice(max(0, step), size + min(0, step)))
        after.append(slice(max(0, -step), size + min(0, -step)))
    return (before[0], before[1]), (after[0], after[1])


def _shift_of(actions: Tokens) -> NDArray[np.int64]:
    table = {action: n for n, action in enumerate(SCROLL, start=1)}
    return np.array([table.get(int(action), 0) for action in actions], np.int64)


def _tile_ahead(frames: Tokens, actions: Tokens) -> NDArray[np.int64]:
    steps = np.array(SHIFTS)[_shift_of(actions)]
    ahead = frames[np.arange(len(frames)), PLAYER[0] + steps[:, 0], PLAYER[1] + steps[:, 1]]
    return np.asarray(ahead, np.int64)


def _is_distinctive(before: Tokens, expected: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether scrolling as expected differs by `MARGIN` tiles from scrolling in any other way."""
    view = np.asarray(before)[:, :VIEW_ROWS]
    inner = np.stack([view[:, 1 + y : VIEW_ROWS - 1 + y, 1 + x : COLUMNS - 1 + x] for y, x in SHIFTS], axis=1)
    chosen = inner[np.arange(len(view)), expected][:, None]
    differing = (inner != chosen).sum((2, 3))
    differing[np.arange(len(view)), expected] = MARGIN
    telling: NDArray[np.bool_] = (differing >= MARGIN).all(1)
    return telling
