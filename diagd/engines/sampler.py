"""From logits to tokens on the host: temperature, exact top-k and top-p, one exponential race a row.

The rules, in this order. Ids outside a row's range are impossible. Temperature 0 takes the largest logit.
Top-k keeps every id whose logit is at least the k-th largest. Top-p looks at what is left, renormalised;
ids of equal logit are treated alike, and the most probable are always kept. Of the kept ids the one of
greatest weight / noise wins, the lowest of equals: with exponential noise of (seed, position of the cell, id)
that is a draw by their probabilities, and laws that differ a little mostly draw the same token from it.

The models disagree on the token at which the cumulated probability crosses p: MineWorld and Cosmos keep it
(an id stays iff strictly more probable ids hold at most p), WHAM drops it (an id stays iff ids at least as
probable, itself included, hold at most p).

``native/sampling.h`` on a device and, where it was compiled, ``native/row_sampling.h`` on the host give the
same ids for the same logits. Everything is therefore a sum, product or quotient of float32, rounded one by
one, with exponentials of our own, and weights are multiples of ``UNIT``: their sums are exact in float64, or
in 64-bit integers, in whatever order they are taken.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Manifest
from diagd.engines.devices.kernels import DrawArguments, host_build
from diagd.engines.engine import VOID, Float, Int, SamplingState
from diagd.engines.noise import KEPT_IDS, noise, noise_rows
from diagd.errors import EngineError, UsageError

UNIT: Final = 2.0**-36
"""What weights are multiples of; the largest of a row is 1. Sums of up to 2**17 ids are exact in float64.

An id less than half of it as probable as the most probable one is never drawn."""

_ROUND: Final = np.float32(2.0**-13)  # float32 next to it are multiples of the unit
_INTEGERS: Final = np.float32(1.5 * 2**23)  # float32 next to it are whole numbers
_TINY: Final = np.float32(1e-30)
_LIGHTEST: Final = np.float32(-100)  # logarithm of a weight that is far below the unit
_POWERS: Final = (1.33335581e-3, 9.61812911e-3, 5.55041087e-2, 2.40226507e-1, 6.93147181e-1)  # ln(2)^n / n!

_LN_2: Final = 0.6931471805599453
_SAMPLE: Final = 256  # ids, at least, that tell where the top-p threshold lies
_FEW: Final = 512  # candidates a row, on average, that are sorted as they are
_BINS: Final = 512  # of the histogram that brackets the threshold where there are more
_ROW_BINS: Final = _BINS + 2  # with an empty one ahead, and one behind for the smallest
_SPARSE: Final = 8  # noise is made for all ids of a row where no fewer than an eighth are kept
_GROUP: Final = 16  # ids whose largest stands for them while the top-k threshold is bracketed


class HostSampler:
    """Draws the tokens of steps by the rules of a bundle.

    Raises:
        UsageError: the bundle lets ids be drawn that it does not have.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._layout, self._keep_crossing = manifest.layout, manifest.sampling.keep_crossing
        self._ranges = cell_ranges(manifest)

    def draw(
        self,
        logits: Float,
        cells: NDArray[np.int64],
        state: SamplingState,
        seeds: NDArray[np.uint64] | None = None,
    ) -> Int:
        """Ids int32 [D] of cells [D] from the logits [D, V] of their rows; ``seeds`` as in ``sample``."""
        if not len(cells):
            return np.empty(0, np.int32)
        low, high = self._ranges[(cells - self._layout.prefix) % self._layout.frame_length].T
        return _drawer()(logits, cells, state, seeds, low, high, self._keep_crossing)


def cell_ranges(manifest: Manifest) -> Int:
    """Ids [low, high) that may be drawn at each place of a frame, int32 [frame_length, 2].

    Known tokens are never drawn; they have the range of the first cell.

    Raises:
        UsageError: the bundle does not have these ids.
    """
    layout = manifest.layout
    table: Int = manifest.sampling.range_table(layout)
    cells = table[layout.before : layout.before + layout.cells]
    _check_ranges(cells[:, 0], cells[:, 1], manifest.output_vocabulary)
    table[: layout.before] = table[layout.before + layout.cells :] = cells[0]
    return table


def sample(
    logits: Float,
    positions: NDArray[np.integer[Any]],
    state: SamplingState,
    *,
    seeds: NDArray[np.uint64] | None = None,
    low: Int | None = None,
    high: Int | None = None,
    keep_crossing: bool = True,
) -> Int:
    """Draw one token a row.

    Args:
        logits: float32 [R, V]; -inf forbids an id.
        positions: int [R] of the cells to be drawn, counted from the start of the stream.
        state: temperature, top-k, top-p and seed.
        seeds: uint64 [R], in place of the one seed.
        low: int32 [R], first id each row may take; 0 without.
        high: int32 [R], one past the last id each row may take; V without.
        keep_crossing: top-p keeps the id at which the cumulated probability crosses p.

    Returns:
        int32 [R] ids.

    Raises:
        UsageError: a range is empty or outside the vocabulary.
        EngineError: a row's largest logit is not finite.
    """
    rows, ids = logits.shape
    low = np.zeros(rows, np.int32) if low is None else low
    high = np.full(rows, ids, np.int32) if high is None else high
    _check_ranges(low, high, ids)
    if not rows:
        return np.empty(0, np.int32)
    return _drawer()(logits, positions, state, seeds, low, high, keep_crossing)


def _drawer() -> Callable[..., Int]:
    """``sample`` where ranges fit and there is a row at least: compiled, where it was."""
    kernels = host_build()
    return draw_plain if kernels is None else partial(draw_compiled, kernels)


def draw_compiled(
    kernels: ctypes.CDLL,
    logits: Float,
    positions: NDArray[np.integer[Any]],
    state: SamplingState,
    seeds: NDArray[np.uint64] | None,
    low: Int,
    high: Int,
    keep_crossing: bool,
) -> Int:
    """``sample`` by the host build of the kernels; ranges fit, one row at least."""
    rows = len(logits)
    keys = np.full(rows, state.seed, np.uint64) if seeds is None else seeds
    tokens = np.empty(rows, np.int32)
    read = (logits, np.float32), (low, np.int32), (high, np.int32), (positions, np.int64), (keys, np.uint64)
    arrays = [np.ascontiguousarray(array, dtype) for array, dtype in read]
    arguments = DrawArguments(
        *(array.ctypes.data for array in (*arrays, tokens)),
        *(logits.shape[1], rows, min(state.top_k, VOID), state.temperature, state.top_p, keep_crossing),
    )
    if refused := kernels.diagd_draw(ctypes.byref(arguments)):
        raise refusal(refused - 1, float(logits[refused - 1, low[refused - 1] : high[refused - 1]].max()))
    return tokens


def draw_plain(
    logits: Float,
    positions: NDArray[np.integer[Any]],
    state: SamplingState,
    seeds: NDArray[np.uint64] | None,
    low: Int,
    high: Int,
    keep_crossing: bool,
) -> Int:
    """``sample`` in NumPy; ranges fit, one row at least."""
    logits, first = _restrict(logits, low, high)
    top = logits.max(axis=1)
    if not math.isfinite(top.sum()):
        first_bad = int(np.flatnonzero(~np.isfinite(top))[0])
        raise refusal(first_bad, float(top[first_bad]))
    if state.temperature == 0:
        return _ids(logits.argmax(axis=1), first)
    weights, kept, columns = kept_weights(logits, top, state, keep_crossing)
    last, rows = first + logits.shape[1], np.arange(len(logits))
    dense = last <= KEPT_IDS or np.count_nonzero(kept) > kept.size // _SPARSE
    if dense and columns is None and seeds is None:
        weights *= kept
        weights /= noise_rows(state.seed, positions, last)[:, first:]
        return _ids(weights.argmax(axis=1), first)
    row, column = np.divmod(np.flatnonzero(kept), kept.shape[1])
    ids = column if columns is None else columns[row, column]
    keys = state.seed if seeds is None else seeds[row]
    scores = weights[row, column] / noise(keys, positions[row], ids + first)
    best = np.maximum.reduceat(scores, row.searchsorted(rows))
    winners = np.flatnonzero(scores == best[row])
    return _ids(ids[winners[row[winners].searchsorted(rows)]], first)


def _ids(columns: NDArray[np.intp], first: int) -> Int:
    ids: Int = columns.astype(np.int32)
    ids += np.int32(first)
    return ids


def kept_weights(
    logits: Float, top: Float, state: SamplingState, keep_crossing: bool
) -> tuple[Float, NDArray[np.bool_], NDArray[np.intp] | None]:
    """Unnormalised probabilities after temperature, and what top-k and top-p keep.

    Args:
        logits: float32 [R, V]; -inf forbids an id.
        top: float32 [R], the largest of each row, finite; its weight is 1.
        state: the temperature is not 0.
        keep_crossing: see ``sample``.

    Returns:
        float32 [R, n], which of them are kept, and their columns; None: n is V.
    """
    columns, k, ids = None, state.top_k, logits.shape[1]
    if 0 < k < ids <= KEPT_IDS:
        logits = np.where(logits >= np.partition(logits, -k, axis=1)[:, -k, None], logits, -np.inf)
    elif 0 < k < ids:
        columns, logits = _top_k(logits, k)
    weights = logits - top[:, None]
    weights *= np.float32(1 / (_LN_2 * float(np.float32(state.temperature))))
    np.maximum(weights, _LIGHTEST, out=weights)
    weights = _powers_of_two(weights)
    if (p := float(np.float32(state.top_p))) == 1:
        return weights, logits > -np.inf, columns
    floors = _nucleus_floors(logits, weights, p)
    if not keep_crossing:
        floors = np.minimum(np.nextafter(floors, np.float32(np.inf)), top)
    return weights, logits >= floors[:, None], columns


def _powers_of_two(logs: Float) -> Float:
    """2**logs in multiples of ``UNIT``, for logs from -100 to 0; a polynomial between whole numbers."""
    shifted = logs + _INTEGERS
    part = logs - (shifted - _INTEGERS)
    result = part * np.float32(_POWERS[0])
    for term in _POWERS[1:]:
        result += np.float32(term)
        result *= part
    result += np.float32(1)
    exponent = shifted.view(np.int32)
    exponent <<= 23
    bits = result.view(np.int32)
    bits += exponent
    result += _ROUND
    result -= _ROUND
    return result


def _check_ranges(low: Int, high: Int, ids: int) -> None:
    if np.any(low < 0) or np.any(low >= high) or np.any(high > ids):
        raise UsageError(
            f"token ranges {list(zip(low.tolist(), high.tolist(), strict=True))} do not all fit a vocabulary"
            f" of {ids}; expected 0 <= low < high <= {ids}"
        )


def _restrict(logits: Float, low: Int, high: Int) -> tuple[Float, int]:
    """The columns some row may take, others' ids at -inf, and the id of the first column."""
    first, last = int(low.min()), int(high.max())
    allowed = logits[:, first:last]
    narrow = np.flatnonzero((low != first) | (high != last))
    if narrow.size:
        allowed = allowed.copy()
        for row in narrow:
            allowed[row, : low[row] - first] = -np.inf
            allowed[row, high[row] - first :] = -np.inf
    return allowed, first


def refusal(row: int, largest: float) -> EngineError:
    """What is raised where a row's largest logit is not finite."""
    return EngineError(
        f"the largest logit of row {row} is {largest}; expected a finite number; the weights or the"
        " precision of this bundle are broken: try --set precision=fp32, or verify the bundle"
    )


def _top_k(logits: Float, k: int) -> tuple[NDArray[np.intp], Float]:
    """Columns [R, n] that top-k keeps, ascending, and their logits; -inf behind those of each row.

    The k-th largest of the maxima of disjoint groups bounds the k-th largest logit from below.
    """
    rows, ids = logits.shape
    group = max(1, min(_GROUP, ids // k))
    maxima = logits[:, : ids // group * group].reshape(rows, group, -1).max(axis=1)
    bound = np.partition(maxima, -k, axis=1)[:, -k, None]
    row, column = np.divmod(np.flatnonzero(logits >= bound), ids)
    values, columns = _by_row(row, logits[row, column], column)
    values[values < np.partition(values, -k, axis=1)[:, -k, None]] = -np.inf
    return columns, values


def _by_row(row: NDArray[np.intp], values: Float, others: NDArray[Any]) -> tuple[Float, NDArray[Any]]:
    """Two arrays [n] over ascending rows, none without, as tables; -inf and 0 behind those of each row."""
    counts = np.bincount(row)
    place = np.arange(row.size) - (counts.cumsum() - counts)[row]
    table = np.full((len(counts), counts.max()), -np.inf, np.float32)
    other = np.zeros(table.shape, others.dtype)
    table[row, place], other[row, place] = values, others
    return table, other


def _nucleus_floors(logits: Float, weights: Float, p: float) -> Float:
    """Logit [R] of the id at which the cumulated probability crosses p, with as little sorting as may be.

    Of logits [R, n] and weights [R, n]; p is below 1.
    """
    rows, width = weights.shape
    total = weights.sum(axis=1, dtype=np.float64)
    share = total * p
    if width <= KEPT_IDS:
        return _crossing(logits, weights, np.zeros(rows), share)
    low, ahead = _guess(logits, weights, total - share), np.zeros(rows)
    places = np.flatnonzero(logits >= low[:, None])
    many = places.size > _FEW * rows
    if many or (np.bincount(places // width, weights.reshape(-1)[places], rows) <= share).any():
        ahead, places = _crossing_bin(logits, weights, low, share)
    row, column = np.divmod(places, width)
    return _crossing(*_by_row(row, logits[row, column], weights[row, column]), ahead, share)


def _guess(logits: Float, weights: Float, rest: NDArray[np.float64]) -> Float:
    """A logit [R] below which, to judge by a sample of the ids, half of what top-p drops lies."""
    step = max(1, logits.shape[1] // _SAMPLE)
    sample, masses = logits[:, ::step], weights[:, ::step]
    rows = np.arange(len(logits))
    order = sample.argsort(axis=1)
    below = masses[rows[:, None], order].cumsum(axis=1, dtype=np.float64) * step
    low: Float = sample[rows, order[rows, np.maximum((below <= rest[:, None] / 2).sum(axis=1) - 1, 0)]]
    return low


def _crossing_bin(
    logits: Float, weights: Float, low: Float, share: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Where the sum over a row, from its largest logit on, exceeds its share, by a histogram down to ``low``.

    Returns:
        The weight [R] ahead of each row's bin, and the flat places of the ids in these bins.
    """
    top, first_bin = logits.max(axis=1), np.arange(len(logits)) * _ROW_BINS
    scale = np.maximum(np.float32(_BINS) / np.maximum(top - low, _TINY), _TINY)
    steps = top[:, None] - logits
    steps *= scale[:, None]
    np.minimum(steps, np.float32(_BINS), out=steps)
    bins = steps.astype(np.intp)
    bins += first_bin[:, None] + 1
    sums = np.bincount(bins.reshape(-1), weights.reshape(-1), len(logits) * _ROW_BINS)
    mass = sums.reshape(-1, _ROW_BINS).cumsum(axis=1)
    crossing = first_bin + (mass <= share[:, None]).sum(axis=1)
    return mass.reshape(-1)[crossing - 1], np.flatnonzero(bins == crossing[:, None])


def _crossing(logits: Float, weights: Float, ahead: NDArray[np.float64], share: NDArray[np.float64]) -> Float:
    """Logit [R] of the candidate [R, n], the largest first, at which their sum exceeds its share.

    ``ahead`` [R] weighs already; ``share`` [R] is less than all of them weigh.
    """
    rows = np.arange(len(logits))
    order = logits.argsort(axis=1)[:, ::-1]
    mass = weights[rows[:, None], order].cumsum(axis=1, dtype=np.float64)
    mass += ahead[:, None]
    floors: Float = logits[rows, order[rows, (mass <= share[:, None]).sum(axis=1)]]
    return floors
