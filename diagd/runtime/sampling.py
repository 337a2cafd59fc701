"""From logits to tokens on the host: temperature, exact top-k and top-p, one inverse-CDF draw a row.

The rules, in this order. Ids outside a row's range are impossible. Temperature 0 takes the largest logit.
Top-k keeps every id whose logit is at least the k-th largest. Top-p looks at what is left, renormalised;
ids of equal logit are treated alike, and the most probable are always kept. The draw walks the kept ids in
order of id, so the token is a function of the row's logits and of its one uniform number.

The models disagree on the token at which the cumulated probability crosses p: MineWorld and Cosmos keep it
(an id stays iff strictly more probable ids hold at most p), WHAM drops it (an id stays iff ids at least as
probable, itself included, hold at most p). ``diagd.export.sampler`` states the same rules as a graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diagd.errors import EngineError, UsageError

_BLOCK: Final = 64  # ids a partial sum of the draw covers
_BINS: Final = 512  # of the histogram that brackets the top-p threshold of a row
_ROW_BINS: Final = _BINS + 2  # with an empty one ahead, and one behind for ids too light to matter
_FEW: Final = 512  # candidates a row, on average, that are sorted as they are
_GROUP: Final = 16  # ids whose largest stands for them while the top-k threshold is bracketed
_ONES: Final = np.ones(_BLOCK, np.float32)
_ZERO: Final = np.zeros(1)
_TEMPERATURES: Final = (1e-3, 1e3)


class Cells(NamedTuple):
    """Some cells of a [R, V] array, row by row, ids ascending; each [n]."""

    row: NDArray[np.intp]
    column: NDArray[np.intp]


@dataclass(frozen=True)
class SamplingSettings:
    """How a token is drawn.

    Attributes:
        temperature: divisor of the logits; 0 is greedy and ignores top_k and top_p.
        top_k: most ids kept, ties aside; 0 keeps all.
        top_p: probability mass kept; 1 keeps all.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        low, high = _TEMPERATURES
        if self.temperature != 0 and not low <= self.temperature <= high:
            raise UsageError(
                f"temperature is {self.temperature}; expected 0 (greedy) or a number from {low:g} to {high:g}"
            )
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise UsageError(f"top-k is {self.top_k}; expected a whole number of ids, or 0 to keep all")
        if not 0 < self.top_p <= 1:
            raise UsageError(
                f"top-p is {self.top_p}; expected a share of probability, above 0 and at most 1 (1 keeps all)"
            )


def sample(
    logits: NDArray[np.float32],
    uniforms: NDArray[np.float32],
    settings: SamplingSettings,
    *,
    low: NDArray[np.int32] | None = None,
    high: NDArray[np.int32] | None = None,
    keep_crossing: bool = True,
) -> NDArray[np.int32]:
    """Draw one token a row.

    Args:
        logits: float32 [R, V].
        uniforms: [R] in (0, 1), see ``diagd.runtime.random``.
        settings: temperature, top-k, top-p.
        low: int32 [R], first id each row may take; 0 without.
        high: int32 [R], one past the last id each row may take; V without.
        keep_crossing: top-p keeps the id at which the cumulated probability crosses p.

    Returns:
        int32 [R] ids.

    Raises:
        UsageError: a range is empty or outside the vocabulary.
        EngineError: a row's largest logit is not finite.
    """
    if not len(logits):
        return np.empty(0, np.int32)
    allowed, first = _restrict(logits, low, high)
    if settings.temperature == 0:
        ids = allowed.argmax(axis=1)
        _check_finite(allowed[np.arange(len(ids)), ids])
    else:
        weights, cells = kept_weights(allowed, settings, keep_crossing=keep_crossing)
        ids = _draw(weights, uniforms) if cells is None else _draw_cells(weights, cells, uniforms)
    tokens: NDArray[np.int32] = ids.astype(np.int32)
    tokens += np.int32(first)
    return tokens


def kept_weights(
    logits: NDArray[np.float32], settings: SamplingSettings, *, keep_crossing: bool
) -> tuple[NDArray[np.float32], Cells | None]:
    """Unnormalised probabilities after temperature, top-k and top-p; 0 where an id is not kept.

    Args:
        logits: float32 [R, V]; -inf forbids an id.
        settings: the temperature is not 0.
        keep_crossing: see ``sample``.

    Returns:
        With top-k, float32 [n] of the cells it leaves, and these cells. Without, float32
        [R, V rounded up to a whole number of blocks], padded with 0, and None. The largest of a row is 1.

    Raises:
        EngineError: a row's largest logit is not finite.
    """
    top = logits.max(axis=1)
    _check_finite(top)
    if 0 < settings.top_k < logits.shape[1]:
        return _weights_of_cells(logits, top, settings, keep_crossing)
    rows, ids = logits.shape
    padded: NDArray[np.float32] = np.empty((rows, -(-ids // _BLOCK) * _BLOCK), np.float32)
    padded[:, ids:] = -np.inf
    np.subtract(logits, top[:, None], out=padded[:, :ids])
    if settings.temperature != 1:
        padded /= np.float32(settings.temperature)
    if settings.top_p == 1:
        return np.exp(padded, out=padded), None
    weights = np.exp(padded)
    floors = _nucleus_floors(logits, top, padded, weights, settings, keep_crossing)
    np.multiply(weights[:, :ids], logits >= floors[:, None], out=weights[:, :ids])
    return weights, None


def _restrict(
    logits: NDArray[np.float32], low: NDArray[np.int32] | None, high: NDArray[np.int32] | None
) -> tuple[NDArray[np.float32], int]:
    """The columns some row may take, others' ids at -inf, and the id of the first column."""
    if low is None and high is None:
        return logits, 0
    rows, ids = logits.shape
    low = np.zeros(rows, np.int32) if low is None else low
    high = np.full(rows, ids, np.int32) if high is None else high
    if np.any(low < 0) or np.any(low >= high) or np.any(high > ids):
        raise UsageError(
            f"token ranges {list(zip(low.tolist(), high.tolist(), strict=True))} do not all fit a vocabulary"
            f" of {ids}; expected 0 <= low < high <= {ids}"
        )
    first, last = int(low.min()), int(high.max())
    allowed = logits[:, first:last]
    narrow = np.flatnonzero((low != first) | (high != last))
    if narrow.size:
        allowed = allowed.copy()
        for row in narrow:
            allowed[row, : low[row] - first] = -np.inf
            allowed[row, high[row] - first :] = -np.inf
    return allowed, first


def _check_finite(top: NDArray[np.float32]) -> None:
    if not math.isfinite(top.sum()):
        row = int(np.flatnonzero(~np.isfinite(top))[0])
        raise EngineError(
            f"the largest logit of row {row} is {top[row]}; expected a finite number; the weights or the"
            " precision of this bundle are broken: try --precision fp32, or verify the bundle"
        )


def _weights_of_cells(
    logits: NDArray[np.float32], top: NDArray[np.float32], settings: SamplingSettings, keep_crossing: bool
) -> tuple[NDArray[np.float32], Cells]:
    """See ``kept_weights``: few cells survive top-k, so nothing else looks at all of them."""
    cells, values = _top_k(logits, settings.top_k)
    weights = np.exp((values - top[cells.row]) / np.float32(settings.temperature))
    if settings.top_p < 1:
        allowed = settings.top_p * np.bincount(cells.row, weights).astype(np.float64)
        floors = _crossed(values, cells.row, top, allowed, settings, keep_crossing)
        weights *= values >= floors[cells.row]
    return weights, cells


def _top_k(logits: NDArray[np.float32], k: int) -> tuple[Cells, NDArray[np.float32]]:
    """Cells that top-k keeps, and their logits.

    The k-th largest of the maxima of disjoint groups bounds the k-th largest logit from below.
    """
    rows, ids = logits.shape
    group = max(1, min(_GROUP, ids // k))
    maxima = logits[:, : ids // group * group].reshape(rows, group, -1).max(axis=1)
    bound = np.partition(maxima, -k, axis=1)[:, -k, None]
    row, column = np.divmod(np.flatnonzero(logits >= bound), ids)
    values = logits[row, column]
    table, _ = _by_row(values, row, rows)
    kept = values >= np.partition(table, -k, axis=1)[:, -k][row]
    return Cells(row[kept], column[kept]), values[kept]


def _by_row(
    values: NDArray[np.float32], row: NDArray[np.intp], rows: int
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Values [n] of ascending rows as a table, -inf behind those of each row, and how many a row has."""
    counts = np.bincount(row, minlength=rows)
    place = np.arange(row.size) - (counts.cumsum() - counts)[row]
    table = np.full((rows, max(1, counts.max())), -np.inf, np.float32)
    table[row, place] = values
    return table, counts


def _nucleus_floors(
    logits: NDArray[np.float32],
    top: NDArray[np.float32],
    logs: NDArray[np.float32],
    weights: NDArray[np.float32],
    settings: SamplingSettings,
    keep_crossing: bool,
) -> NDArray[np.float32]:
    """Smallest logit [R] that top-p keeps in each row, without sorting the rows.

    Ids lighter than (1 - p) of the mean weight cannot hold 1 - p of the sum together: the threshold lies
    above them. Where many are left, a histogram finds the bin of the threshold, and only that bin is sorted.

    Args:
        logits: [R, V].
        top: [R], the largest of each row.
        logs: [R, n], logarithms of the weights, -inf behind V; overwritten.
        weights: [R, n].
        settings: top_p is below 1.
        keep_crossing: see ``sample``.
    """
    rows, width = weights.shape
    total = weights.sum(axis=1)
    allowed: NDArray[np.float64] = settings.top_p * total.astype(np.float64)
    heavy = weights >= (total * np.float32((1 - settings.top_p) / width))[:, None]
    if np.count_nonzero(heavy) <= _FEW * rows:
        places = np.flatnonzero(heavy)
    else:
        ahead, places = _crossing_bins(logs, weights, allowed, (1 - settings.top_p) / width)
        allowed = allowed - ahead
    row, column = np.divmod(places, width)
    return _crossed(logits[row, column], row, top, allowed, settings, keep_crossing)


def _crossing_bins(
    logs: NDArray[np.float32], weights: NDArray[np.float32], allowed: NDArray[np.float64], lightest: float
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Where the sum over a row, from its heaviest weight on, exceeds what is allowed.

    Args:
        logs: [R, n], logarithms of the weights, the largest 0; overwritten.
        weights: [R, n].
        allowed: [R].
        lightest: weight under which ids may share one bin.

    Returns:
        The weight [R] ahead of each row's bin in a histogram over ``logs``, and the flat places of the ids in
        these bins.
    """
    first_bin = np.arange(len(logs)) * _ROW_BINS
    logs *= np.float32(_BINS / math.log(lightest / 2))
    np.clip(logs, 0, _BINS, out=logs)
    logs += (first_bin + 1).astype(np.float32)[:, None]
    bins = logs.astype(np.intp)
    sums = np.bincount(bins.reshape(-1), weights.reshape(-1), len(logs) * _ROW_BINS)
    mass = sums.reshape(-1, _ROW_BINS).cumsum(axis=1)
    crossing = first_bin + (mass <= allowed[:, None]).sum(axis=1)
    return mass.reshape(-1)[crossing - 1], np.flatnonzero(bins == crossing[:, None])


def _crossed(
    logits: NDArray[np.float32],
    row: NDArray[np.intp],
    top: NDArray[np.float32],
    allowed: NDArray[np.float64],
    settings: SamplingSettings,
    keep_crossing: bool,
) -> NDArray[np.float32]:
    """Smallest kept logit [R] of candidates [n] in ascending rows, which may weigh ``allowed`` [R] together.

    A row without candidates keeps everything.
    """
    table, counts = _by_row(logits, row, len(top))
    table.sort(axis=1)
    candidates = table[:, ::-1]
    weights = np.exp((candidates - top[:, None]) / np.float32(settings.temperature))
    index = (weights.cumsum(axis=1, dtype=np.float64) <= allowed[:, None]).sum(axis=1)
    floors: NDArray[np.float32] = candidates[
        np.arange(len(top)), np.minimum(index, np.maximum(counts - 1, 0))
    ]
    if keep_crossing:
        return floors
    return np.where(index < counts, np.minimum(np.nextafter(floors, np.float32(np.inf)), top), floors)


def _draw(weights: NDArray[np.float32], uniforms: NDArray[Any]) -> NDArray[np.intp]:
    """First id of each row at which the cumulated weight exceeds the row's uniform share of the whole.

    The sum runs over blocks and then inside one block, which is faster and rounds less than one long sum.
    """
    blocks = weights.reshape(len(weights), -1, _BLOCK)
    ends = (blocks @ _ONES).cumsum(axis=1, dtype=np.float64)
    rows, target = np.arange(len(weights)), uniforms * ends[:, -1]
    block = (ends <= target[:, None]).sum(axis=1)
    inside = blocks[rows, block].cumsum(axis=1, dtype=np.float64)
    whole = inside[:, -1:]
    # The sum of a block is rounded: held below its weights' own, what is left leads to an id that has one.
    left = np.minimum((ends[rows, block] - target)[:, None], whole)
    ids: NDArray[np.intp] = block * _BLOCK + (whole - inside >= left).sum(axis=1)
    return ids


def _draw_cells(weights: NDArray[np.float32], cells: Cells, uniforms: NDArray[Any]) -> NDArray[np.intp]:
    """The same among the cells of each row, in one sum over all rows."""
    ends = weights.cumsum(dtype=np.float64)
    bounds = np.concatenate([_ZERO, ends])[cells.row.searchsorted(np.arange(len(uniforms) + 1))]
    target = bounds[:-1] + uniforms * np.diff(bounds)
    ids: NDArray[np.intp] = cells.column[ends.searchsorted(target, side="right")]
    return ids
