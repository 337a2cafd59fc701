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
_LIGHTEST: Final = np.float32(-100)  # logarithm of a weight that is far below the unit
_POWERS: Final = (1.33335581e-3, 9.61812911e-3, 5.55041087e-2, 2.40226507e-1, 6.93147181e-1)  # ln(2)^n / n!

_LN_2: Final = 0.6931471805599453
_BINS: Final = 16  # for each halving of the weight: the top-p threshold is looked for in one of them


class HostSampler:
    """Draws the tokens of steps by the rules of a bundle."""

    def __init__(self, manifest: Manifest) -> None:
        self._layout, self._keep_crossing = manifest.layout, manifest.sampling.keep_crossing
        self._ranges = manifest.sampling.range_table(manifest.layout)

    def draw(self, logits: Float, cells: NDArray[np.int64], state: SamplingState) -> Int:
        """Ids int32 [D] of cells [D] from the logits [D, V] of their rows."""
        if not len(cells):
            return np.empty(0, np.int32)
        low, high = self._ranges[(cells - self._layout.prefix) % self._layout.frame_length].T
        return _drawer()(logits, cells, state, low, high, self._keep_crossing)


def sample(
    logits: Float,
    positions: NDArray[np.integer[Any]],
    state: SamplingState,
    *,
    low: Int | None = None,
    high: Int | None = None,
    keep_crossing: bool = True,
) -> Int:
    """Draw one token a row, int32 [R].

    Args:
        logits: float32 [R, V]; -inf forbids an id.
        positions: int [R] of the cells to be drawn, counted from the start of the stream.
        state: temperature, top-k, top-p and seed.
        low: int32 [R], first id each row may take; 0 without.
        high: int32 [R], one past the last id each row may take; V without.
        keep_crossing: top-p keeps the id at which the cumulated probability crosses p.

    Raises:
        UsageError: a range is empty or outside the vocabulary.
        EngineError: a row's largest logit is not finite.
    """
    rows, ids = logits.shape
    low = np.zeros(rows, np.int32) if low is None else low
    high = np.full(rows, ids, np.int32) if high is None else high
    if np.any(low < 0) or np.any(low >= high) or np.any(high > ids):
        raise UsageError(
            f"token ranges {list(zip(low.tolist(), high.tolist(), strict=True))} do not all fit a vocabulary"
            f" of {ids}; expected 0 <= low < high <= {ids}"
        )
    if not rows:
        return np.empty(0, np.int32)
    return _drawer()(logits, positions, state, low, high, keep_crossing)


def _drawer() -> Callable[..., Int]:
    """``sample`` where ranges fit and there is a row at least: compiled, where it was."""
    kernels = host_build()
    return draw_plain if kernels is None else partial(draw_compiled, kernels)


def draw_compiled(
    kernels: ctypes.CDLL,
    logits: Float,
    positions: NDArray[np.integer[Any]],
    state: SamplingState,
    low: Int,
    high: Int,
    keep_crossing: bool,
) -> Int:
    """``sample`` by the host build of the kernels; ranges fit, one row at least."""
    rows = len(logits)
    keys = np.full(rows, state.seed, np.uint64)
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
    low: Int,
    high: Int,
    keep_crossing: bool,
) -> Int:
    """``sample`` in NumPy; ranges fit, one row at least."""
    logits, first = _restrict(logits, low, high)
    top = logits.max(axis=1)
    if not (finite := np.isfinite(top)).all():
        first_bad = int(finite.argmin())
        raise refusal(first_bad, float(top[first_bad]))
    if state.temperature == 0:
        return _ids(logits.argmax(axis=1), first)
    weights, kept = kept_weights(logits, top, state, keep_crossing)
    last, rows = first + logits.shape[1], np.arange(len(logits))
    if last <= KEPT_IDS:
        weights *= kept
        weights /= noise_rows(state.seed, positions, last)[:, first:]
        return _ids(weights.argmax(axis=1), first)
    row, column = np.divmod(np.flatnonzero(kept), kept.shape[1])
    scores = weights[row, column] / noise(state.seed, positions[row], column + first)
    best = np.maximum.reduceat(scores, row.searchsorted(rows))
    winners = np.flatnonzero(scores == best[row])
    return _ids(column[winners[row[winners].searchsorted(rows)]], first)


def _ids(columns: NDArray[np.intp], first: int) -> Int:
    ids: Int = columns.astype(np.int32)
    ids += np.int32(first)
    return ids


def kept_weights(
    logits: Float, top: Float, state: SamplingState, keep_crossing: bool
) -> tuple[Float, NDArray[np.bool_]]:
    """Unnormalised probabilities [R, V] after temperature, and what top-k and top-p keep.

    Args:
        logits: float32 [R, V]; -inf forbids an id.
        top: float32 [R], the largest of each row, finite; its weight is 1.
        state: the temperature is not 0.
        keep_crossing: see ``sample``.
    """
    k, p = state.top_k, float(np.float32(state.top_p))
    logs = logits - top[:, None]
    logs *= np.float32(1 / (_LN_2 * float(np.float32(state.temperature))))
    np.maximum(logs, _LIGHTEST, out=logs)
    weights, kept = _powers_of_two(logs), logits > -np.inf
    if 0 < k < logits.shape[1]:
        kept = logits >= np.partition(logits, -k, axis=1)[:, -k, None]
        weights *= kept
    if p < 1:
        floors = np.array([_nucleus_floor(*row, p) for row in zip(logits, logs, weights, strict=True)])
        if not keep_crossing:
            floors = np.minimum(np.nextafter(floors, np.float32(np.inf)), top)
        kept &= logits >= floors[:, None]
    return weights, kept


def _nucleus_floor(logits: Float, logs: Float, weights: Float, p: float) -> np.float32:
    """Logit at which the weights [V], cumulated from the largest on, cross the share p: first by bins."""
    bins = (logs * np.float32(-_BINS)).astype(np.intp)
    mass = np.bincount(bins, weights).cumsum()
    share = p * mass[-1]
    crossing = int(mass.searchsorted(share, side="right"))
    inside = np.flatnonzero(bins == crossing)
    inside = inside[logits[inside].argsort()[::-1]]
    ahead = mass[crossing - 1] if crossing else 0.0
    place = (ahead + weights[inside].cumsum(dtype=np.float64)).searchsorted(share, side="right")
    floor: np.float32 = logits[inside[min(int(place), inside.size - 1)]]  # another order rounds otherwise
    return floor


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
