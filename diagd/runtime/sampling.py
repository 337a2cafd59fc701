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

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.errors import EngineError, UsageError

_BLOCK: Final = 64  # ids a partial sum of the draw covers
_BINS: Final = 512  # of the histogram that brackets the top-p threshold
_TEMPERATURES: Final = (1e-3, 1e3)


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
        _check_finite(allowed.max(axis=1))
        ids = allowed.argmax(axis=1)
    else:
        ids = _draw(kept_weights(allowed, settings, keep_crossing=keep_crossing), uniforms)
    tokens: NDArray[np.int32] = (ids + first).astype(np.int32)
    return tokens


def kept_weights(
    logits: NDArray[np.float32], settings: SamplingSettings, *, keep_crossing: bool
) -> NDArray[np.float32]:
    """Unnormalised probabilities after temperature, top-k and top-p; 0 where an id is not kept.

    Args:
        logits: float32 [R, V]; -inf forbids an id.
        settings: the temperature is not 0.
        keep_crossing: see ``sample``.

    Returns:
        float32 [R, V rounded up to a whole number of blocks], largest 1, padded with 0.

    Raises:
        EngineError: a row's largest logit is not finite.
    """
    rows, ids = logits.shape
    top = logits.max(axis=1)
    _check_finite(top)
    padded: NDArray[np.float32] = np.zeros((rows, -(-ids // _BLOCK) * _BLOCK), np.float32)
    weights = padded[:, :ids]
    np.subtract(logits, top[:, None], out=weights)
    np.divide(weights, np.float32(settings.temperature), out=weights)
    np.exp(weights, out=weights)
    if settings.top_k or settings.top_p < 1:
        for row, weight in zip(logits, weights, strict=True):
            np.multiply(weight, row >= _floor(row, weight, settings, keep_crossing), out=weight)
    return padded


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
    if not np.isfinite(top).all():
        row = int(np.flatnonzero(~np.isfinite(top))[0])
        raise EngineError(
            f"the largest logit of row {row} is {top[row]}; expected a finite number; the weights or the"
            " precision of this bundle are broken: try --precision fp32, or verify the bundle"
        )


def _floor(
    logits: NDArray[np.float32],
    weights: NDArray[np.float32],
    settings: SamplingSettings,
    keep_crossing: bool,
) -> np.float32:
    """Smallest logit that is kept in one row of [V] logits and their weights."""
    floor = np.float32(-np.inf)
    if 0 < settings.top_k < logits.size:
        floor = _largest(logits, settings.top_k)
        kept = logits >= floor
        logits, weights = logits[kept], weights[kept]
    if settings.top_p < 1:
        floor = _nucleus_floor(logits, weights, settings, keep_crossing)
    return floor


def _largest(values: NDArray[np.float32], k: int) -> np.float32:
    """The k-th largest of the values; the k-th largest maximum of disjoint groups bounds it from below."""
    maxima = values[: values.size // 16 * 16].reshape(16, -1).max(axis=0)
    if k <= maxima.size:
        values = values[values >= np.partition(maxima, -k)[-k]]
    return np.float32(np.partition(values, -k)[-k])


def _nucleus_floor(
    logits: NDArray[np.float32],
    weights: NDArray[np.float32],
    settings: SamplingSettings,
    keep_crossing: bool,
) -> np.float32:
    """Smallest logit that top-p keeps, without sorting the row.

    Ids lighter than (1 - p) of the mean weight cannot hold 1 - p together, so the threshold lies above
    them. A histogram over the logarithm of the weight finds its bin, and only that bin is sorted.
    """
    top, temperature = logits.max(), np.float32(settings.temperature)
    total = float(weights.sum())
    allowed = settings.top_p * total
    cut = max((1 - settings.top_p) * total / weights.size, float(np.finfo(np.float32).tiny))
    heavy = weights >= cut
    if np.count_nonzero(heavy) < heavy.size // 8:  # compressing is quick where the mask is predictable
        logits, weights = logits[heavy], weights[heavy]
    depths = (top - logits) * (np.float32(_BINS / (1 - np.log(cut))) / temperature)
    bins = np.minimum(depths, _BINS).astype(np.intp)
    mass = np.bincount(bins, weights=weights, minlength=_BINS + 1).cumsum()
    crossing = int(mass.searchsorted(allowed, side="right"))
    candidates = np.sort(logits[bins == crossing])[::-1]
    if not candidates.size:  # p of the whole row exceeds its sum by a rounding
        return np.float32(logits.min())
    inside = np.exp((candidates - top) / temperature).cumsum(dtype=np.float64)
    before = mass[crossing - 1] if crossing else 0.0
    index = int((inside + before).searchsorted(allowed, side="right"))
    floor = candidates[min(index, candidates.size - 1)]
    if not keep_crossing and index < candidates.size:
        floor = min(np.nextafter(floor, np.float32(np.inf)), top)
    return np.float32(floor)


def _draw(weights: NDArray[np.float32], uniforms: NDArray[Any]) -> NDArray[np.intp]:
    """First id of each row at which the cumulated weight exceeds the row's uniform share of the whole.

    The sum runs over blocks and then inside one block, which is faster and rounds less than one long sum.
    """
    blocks = weights.reshape(len(weights), -1, _BLOCK)
    sums = blocks.sum(axis=2)
    ends = sums.cumsum(axis=1, dtype=np.float64)
    rows = np.arange(len(weights))
    target = uniforms * ends[:, -1]
    block = _first_beyond(ends, target)
    inside = blocks[rows, block].cumsum(axis=1, dtype=np.float64)
    rest = target - (ends[rows, block] - sums[rows, block])
    return block * _BLOCK + _first_beyond(inside, rest)


def _first_beyond(cumulated: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.intp]:
    """First column of each row above the target, which is held below the last column against rounding."""
    below = np.minimum(target, np.nextafter(cumulated[:, -1], 0))
    return np.asarray(np.count_nonzero(cumulated <= below[:, None], axis=1), np.intp)
