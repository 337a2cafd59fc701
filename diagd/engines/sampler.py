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

Noise is of a cell and an id and of nothing else: the same cell meets the same numbers whatever the schedule,
the pass, the window or the padding that decodes it, so that decoders are comparable draw by draw, and there
is no state to save.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Manifest
from diagd.engines.devices.kernels import DrawArguments, address, host_build
from diagd.engines.engine import VOID, Float, Int, SamplingState
from diagd.errors import EngineError, UsageError

Words = NDArray[np.uint64]

UNIT: Final = 2.0**-36
"""What weights are multiples of; the largest of a row is 1. Sums of up to 2**17 ids are exact in float64.

An id less than half of it as probable as the most probable one is never drawn."""

_ROUND: Final = np.float32(2.0**-13)  # float32 next to it are multiples of the unit
_INTEGERS: Final = np.float32(1.5 * 2**23)  # float32 next to it are whole numbers
_LIGHTEST: Final = np.float32(-100)  # logarithm of a weight that is far below the unit
_POWERS: Final = (1.33335581e-3, 9.61812911e-3, 5.55041087e-2, 2.40226507e-1, 6.93147181e-1)  # ln(2)^n / n!

_LN_2: Final = 0.6931471805599453
_BINS: Final = 16  # for each halving of the weight: the top-p threshold is looked for in one of them

_MULTIPLIERS: Final = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS: Final = np.outer(np.arange(10), [0x9E3779B9, 0xBB67AE85]).astype(np.uint64)  # of each round
_LOW_WORD: Final = np.uint64(0xFFFFFFFF)
_WORD_BITS: Final = np.uint64(32)
_TAG: Final = 1  # last word of the counter: what the numbers are for

_CHUNK_BITS: Final = 7
"""Numbers of so many neighbouring positions are made at once: a round costs the same for many as for one."""

KEPT_IDS: Final = 512
"""Numbers of so many ids are made for all of them, and kept."""

_AT_ONCE: Final = 1 << 13  # cells whose words are made together

_ROOT_BITS: Final = 0x3F3504F3  # of the square root of one half


class HostSampler:
    """Draws the tokens of up to so many rows of a pass by the rules of a bundle.

    Attributes:
        keys: uint64 [2, R], positions of the cells of rows, counted from the start of the stream, and seeds.
        drawn: int32 [4, R], numbers of the rows in a pass, places that their tokens go to, the first id that
            each may take, and one past the last.
    """

    def __init__(self, manifest: Manifest, rows: int) -> None:
        self._layout, self._keep_crossing = manifest.layout, manifest.sampling.keep_crossing
        self._ranges: Int = manifest.sampling.range_table(manifest.layout).T
        self.keys, self.drawn = np.zeros((2, rows), np.uint64), np.zeros((4, rows), np.int32)
        self._ids = np.zeros(rows, np.int32)
        # What is the same in every pass is looked up once: behind an engine, nothing of this is in a cache.
        self._kernels, self._first = host_build(), -1
        self._arguments = DrawArguments(keep_crossing=self._keep_crossing)
        names = "low", "high", "positions", "seeds", "tokens"
        arrays: list[NDArray[Any]] = [*self.drawn[2:], *self.keys, self._ids]
        self._arrays = [
            (name, address(array), array.itemsize) for name, array in zip(names, arrays, strict=True)
        ]

    def ranges_of(self, cells: NDArray[np.int64]) -> Int:
        """Ids [2, D] that may stand at cells [D]: the first of each, and one past the last."""
        return np.take(self._ranges, (cells - self._layout.prefix) % self._layout.frame_length, axis=1)

    def draw(self, logits: Float, rows: slice, state: SamplingState) -> Int:
        """Ids int32 [D] of some rows, valid until the next are drawn, from their logits [D, V]."""
        low, high = self.drawn[2, rows], self.drawn[3, rows]
        if not len(low):
            return low
        if self._kernels is None:
            cells, seeds = self.keys[:, rows]
            return draw_plain(logits, cells.view(np.int64), state, low, high, self._keep_crossing, seeds)
        arguments = self._arguments
        if rows.start != self._first:
            self._first = rows.start
            for name, begin, size in self._arrays:
                setattr(arguments, name, begin + rows.start * size)
        arguments.logits, arguments.stride, arguments.rows = address(logits), logits.shape[1], len(low)
        arguments.top_k, arguments.top_p = min(state.top_k, VOID), state.top_p
        arguments.temperature = state.temperature
        _draw(self._kernels, arguments, logits, low, high)
        return self._ids[rows]


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
    seeds: Words | None = None,
) -> Int:
    """``sample`` by the host build of the kernels; ranges fit, one row at least.

    ``seeds`` are of the rows, uint64 [R]; by default those of ``state``.
    """
    rows = len(logits)
    keys = np.full(rows, state.seed, np.uint64) if seeds is None else seeds
    tokens = np.empty(rows, np.int32)
    read = (logits, np.float32), (low, np.int32), (high, np.int32), (positions, np.int64), (keys, np.uint64)
    arrays = [np.ascontiguousarray(array, dtype) for array, dtype in read]
    arguments = DrawArguments(
        *map(address, (*arrays, tokens)),
        *(logits.shape[1], rows, min(state.top_k, VOID), state.temperature, state.top_p, keep_crossing),
    )
    _draw(kernels, arguments, logits, low, high)
    return tokens


def _draw(kernels: ctypes.CDLL, arguments: DrawArguments, logits: Float, low: Int, high: Int) -> None:
    if refused := kernels.diagd_draw(ctypes.byref(arguments)):
        raise refusal(refused - 1, float(logits[refused - 1, low[refused - 1] : high[refused - 1]].max()))


def draw_plain(
    logits: Float,
    positions: NDArray[np.integer[Any]],
    state: SamplingState,
    low: Int,
    high: Int,
    keep_crossing: bool,
    seeds: Words | None = None,
) -> Int:
    """As ``draw_compiled``, in NumPy."""
    if seeds is not None:
        ids = np.empty(len(logits), np.int32)
        for seed in np.unique(seeds):
            rows, own = seeds == seed, replace(state, seed=int(seed))
            ids[rows] = draw_plain(logits[rows], positions[rows], own, low[rows], high[rows], keep_crossing)
        return ids
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


def check_seed(seed: int) -> None:
    """Refuse (UsageError) what is no key."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
        raise UsageError(f"seed is {seed!r}; expected an integer from 0 to 2**64 - 1; choose another seed")


def philox(counter: Words, key: int) -> Words:
    """Philox4x32-10, the block function of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3".

    ``counter`` [4, ...] and the result hold 32-bit words in uint64. ``key``: of 64 bits.
    """
    multipliers = _MULTIPLIERS.reshape(2, *(1,) * (counter.ndim - 1))
    words = np.array([key & 0xFFFFFFFF, key >> 32], np.uint64).reshape(multipliers.shape)
    even, odd = counter[0::2].copy(), counter[1::2].copy()  # words 0 and 2, 1 and 3
    product = np.empty_like(even)
    swapped = product[::-1]
    for keys in words + _KEY_STEPS.reshape(-1, *multipliers.shape) & _LOW_WORD:
        np.multiply(even, multipliers, out=product)
        np.right_shift(swapped, _WORD_BITS, out=even)
        even ^= odd
        even ^= keys
        np.bitwise_and(swapped, _LOW_WORD, out=odd)
    return np.stack([even[0], odd[0], even[1], odd[1]])


def noise(seed: int, positions: NDArray[np.integer[Any]], ids: NDArray[np.integer[Any]]) -> Float:
    """Numbers float32 [n], exponentially distributed with mean 1, above 0, of some ids at some positions.

    Args:
        seed: 0 <= seed < 2**64; the Philox key.
        positions: int [n], counted from the start of the stream and never rolled back with the window.
        ids: int [n]; a block of the generator serves four, so that neighbours are made together.
    """
    result = np.empty(len(ids), np.float32)
    for start in range(0, len(ids), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        result[part] = _exponential(_words(seed, positions[part], ids[part]))
    return result


def _words(seed: int, positions: NDArray[np.integer[Any]], ids: NDArray[np.integer[Any]]) -> Words:
    """Random words [n] of ids; those of neighbours in a block of four are made once."""
    block = ids >> 2
    first = np.ones(len(ids), np.bool_)
    first[1:] = (block[1:] != block[:-1]) | (positions[1:] != positions[:-1])
    position, four = positions[first].astype(np.uint64), block[first].astype(np.uint64)
    counter = np.stack([position & _LOW_WORD, position >> _WORD_BITS, four, np.full_like(four, _TAG)])
    words: Words = philox(counter, seed)[ids & 3, first.cumsum() - 1]
    return words


def noise_rows(seed: int, positions: NDArray[np.integer[Any]], ids: int) -> Float:
    """Numbers of all of a few ids at positions [R], float32 [R, ids]; those of neighbours are kept."""
    low = (1 << _CHUNK_BITS) - 1
    return np.stack([_chunk(seed, at >> _CHUNK_BITS, ids)[at & low] for at in positions.tolist()])


@lru_cache(maxsize=64)
def _chunk(seed: int, number: int, ids: int) -> Float:
    places, each = np.divmod(np.arange(ids << _CHUNK_BITS), ids)
    return noise(seed, places + (number << _CHUNK_BITS), each).reshape(-1, ids)


def _exponential(words: Words) -> Float:
    """-ln(1 - v) of v = (word + 1/2) / 2**32.

    Small results win races, so v is what has full precision: float32 uniforms next to 1 would be too coarse.
    With 1 - v = m * 2**e, m around 1, this is -e ln 2 + 2 artanh(s) of s = (1 - m) / (1 + m), a short series.
    """
    v = words.astype(np.float32)
    v *= np.float32(2.0**-32)
    v += np.float32(2.0**-33)
    np.minimum(v, np.float32(1 - 2.0**-24), out=v)
    rest = np.float32(1) - v
    bits = rest.view(np.int32)
    exponent = (bits - np.int32(_ROOT_BITS)) >> 23
    bits -= exponent << 23  # rest becomes m
    z = np.where(exponent == 0, v, np.float32(1) - rest)
    s = z / (np.float32(2) - z)
    square = s * s
    series = square * np.float32(1 / 7)
    for term in (1 / 5, 1 / 3):
        series += np.float32(term)
        series *= square
    series += np.float32(1)
    series *= s + s
    result: Float = series - exponent.astype(np.float32) * np.float32(_LN_2)
    return result
