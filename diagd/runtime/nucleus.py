"""The top-p threshold of a row of logits, without sorting the row."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

BLOCK: Final = 64
"""Ids that a partial sum covers; rows of weights are padded to whole blocks."""

_ONES: Final = np.ones(BLOCK, np.float32)
_FEW: Final = 512  # candidates of a row that are sorted as they are
_STRIDE: Final = 16  # of the sample that brackets the top-p threshold of a row
_REACH: Final = 1.5  # times the weight that its first edge is off by
_SLACK: Final = 0.01  # by which it is wider, of the weight below the threshold
_TINY: Final = np.finfo(np.float32).tiny


def nucleus_floors(
    logits: NDArray[np.float32],
    weights: NDArray[np.float32],
    total: NDArray[np.float64],
    shift: NDArray[np.float32],
    top_p: float,
    temperature: float,
    top: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Smallest logit [R] that top-p keeps in each row, hardly ever sorting a whole row.

    Ids lighter than (1 - p) of the mean weight cannot hold 1 - p of the sum together: the threshold lies
    above them. Where many are left, a sample of the row brackets it; where it failed, the row is sorted.

    Args:
        logits: [R, V].
        weights: [R, n], see ``diagd.runtime.sampling.exponentials``.
        total: [R], likewise.
        shift: [R], likewise.
        top_p: below 1.
        temperature: divisor of the logits.
        top: see ``crossing_floors``.
    """
    rows, width = weights.shape
    allowed, ahead = top_p * total, np.zeros(rows)
    heavy = weights >= (total * ((1 - top_p) / width)).astype(np.float32)[:, None]
    many = np.array([np.count_nonzero(row) > _FEW for row in heavy])
    lost = np.zeros(rows, bool)
    if many.all():
        places, ahead, lost = _bracket(weights, total, allowed)
    elif many.any():
        heavy[many] = False
        inside, ahead[many], lost[many] = _bracket(weights[many], total[many], allowed[many])
        row, column = np.divmod(inside, width)
        heavy[np.flatnonzero(many)[row], column] = True
        places = np.flatnonzero(heavy)
    else:
        places = np.flatnonzero(heavy)
    row, column = np.divmod(places, width)
    floors = crossing_floors(logits[row, column], row, shift, allowed - ahead, temperature, top)
    if lost.any():
        row = np.repeat(np.arange(np.count_nonzero(lost)), logits.shape[1])
        limit = None if top is None else top[lost]
        whole = logits[lost].reshape(-1)
        floors[lost] = crossing_floors(whole, row, shift[lost], allowed[lost], temperature, limit)
    return floors


def _bracket(
    weights: NDArray[np.float32], total: NDArray[np.float64], allowed: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.bool_]]:
    """Few cells around the weight at which the sum over a row, from its heaviest on, exceeds ``allowed``.

    A sorted sample tells how much weight lies below each of its values: its guess of the threshold is one
    edge of the bracket. The weight above that edge is then summed exactly, and the other edge is the value
    somewhat further away than the sample says is needed.

    Args:
        weights: [R, n].
        total: [R], the sum of each row.
        allowed: [R].

    Returns:
        Flat places of the cells, the weight ahead of them [R], and rows [R] whose threshold is elsewhere.
    """
    rows, width = weights.shape
    row = np.arange(rows)
    ladder: NDArray[np.float32] = np.full((rows, -(-width // _STRIDE) + 2), np.inf, np.float32)
    ladder[:, 0] = _TINY
    ladder[:, 1:-1] = weights[:, ::_STRIDE]
    ladder[:, 1:-1].sort(axis=1)
    below = ladder[:, :-1].cumsum(axis=1) * np.float32(_STRIDE)
    light = total - allowed
    first = (below <= light[:, None]).sum(axis=1)
    edge = ladder[row, first]
    above = row_sums(weights * (weights >= edge[:, None]))
    missing = allowed - above
    towards = np.where(missing < 0, 1, -1)
    goal = below[row, np.minimum(first, below.shape[1] - 1)] + towards * (
        _REACH * np.abs(missing) + _SLACK * light
    )
    place = (below <= goal[:, None]).sum(axis=1) + towards
    other = ladder[row, np.clip(place, 0, ladder.shape[1] - 1)]
    cells = (weights >= np.minimum(edge, other)[:, None]) & (weights < np.maximum(edge, other)[:, None])
    places = np.flatnonzero(cells)
    inside = np.bincount(places // width, weights.reshape(-1)[places], rows)
    ahead = np.where(missing < 0, above - inside, above)
    missed = (ahead > allowed) | (ahead + inside <= allowed)
    return places, ahead, missed


def crossing_floors(
    logits: NDArray[np.float32],
    row: NDArray[np.intp],
    shift: NDArray[np.float32],
    spare: NDArray[np.float64],
    temperature: float,
    top: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Smallest kept logit [R] of candidates [n] in ascending rows.

    Args:
        logits: [n].
        row: [n].
        shift: [R], see ``diagd.runtime.sampling.exponentials``.
        spare: [R], what the candidates may weigh together.
        temperature: divisor of the logits.
        top: [R], the largest of each row, if the id that crosses is dropped unless it is the largest.
    """
    table, counts = by_row(logits, row, len(spare))
    table.sort(axis=1)
    candidates = table[:, ::-1]
    weights = np.exp((table - shift[:, None]) / np.float32(temperature))[:, ::-1]
    index = (weights.cumsum(axis=1, dtype=np.float64) <= spare[:, None]).sum(axis=1)
    floors: NDArray[np.float32] = candidates[
        np.arange(len(spare)), np.minimum(index, np.maximum(counts - 1, 0))
    ]
    if top is None:
        return floors
    return np.where(index < counts, np.minimum(np.nextafter(floors, np.float32(np.inf)), top), floors)


def by_row(
    values: NDArray[np.float32], row: NDArray[np.intp], rows: int
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Values [n] of ascending rows as a table, -inf behind those of each row, and how many a row has."""
    counts = np.bincount(row, minlength=rows)
    place = np.arange(row.size) - (counts.cumsum() - counts)[row]
    table = np.full((rows, max(1, counts.max())), -np.inf, np.float32)
    table[row, place] = values
    return table, counts


def row_sums(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sum [R] of each row [R, n], n a multiple of ``BLOCK``."""
    sums: NDArray[np.float64] = block_sums(weights).sum(axis=1, dtype=np.float64)
    return sums


def block_sums(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums [R, n / BLOCK] over the blocks of each row."""
    sums: NDArray[np.float32] = weights.reshape(len(weights), -1, BLOCK) @ _ONES
    return sums
