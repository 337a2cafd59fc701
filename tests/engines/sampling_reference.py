"""The sampling rules once more, in sorted float64 NumPy: what the sampler is tested against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Row = NDArray[np.float32]


def kept_probabilities(
    row: NDArray[Any], temperature: float, top_k: int, top_p: float, keep_crossing: bool
) -> tuple[NDArray[np.float64], float]:
    """Final distribution of one row, and how near to p a cumulated mass comes where it matters."""
    values = row.astype(np.float64)
    kept = np.isfinite(values)
    if 0 < top_k < kept.sum():
        kept &= values >= np.sort(values)[-top_k]
    weights = np.where(kept, np.exp((values - values.max()) / temperature), 0.0)
    mass = weights / weights.sum()
    margin = 1.0
    if top_p < 1:
        distinct = np.unique(values[kept])[::-1]
        inclusive = np.cumsum([mass[values == value].sum() for value in distinct])
        decisive = np.concatenate([[0.0], inclusive[:-1]]) if keep_crossing else inclusive
        margin = float(np.abs(decisive - top_p).min())
        chosen = decisive <= top_p
        chosen[0] = True
        kept &= np.isin(values, distinct[chosen])
    weights = np.where(kept, weights, 0.0)
    return weights / weights.sum(), margin


def draw(probabilities: NDArray[np.float64], noise: NDArray[np.float32]) -> tuple[int, float]:
    """The id of greatest probability over noise, and by what share of it the second falls short."""
    scores = probabilities / noise.astype(np.float64)
    second, first = np.sort(scores)[-2:]
    return int(scores.argmax()), float((first - second) / first)


@st.composite
def rows(draw_value: st.DrawFn, count: int, ids: int) -> NDArray[np.float32]:
    """float32 [count, ids]: each row smooth, with many ties, peaked, flat, or spread over many binades."""
    random = np.random.default_rng(draw_value(st.integers(0, 2**32 - 1)))
    shapes: dict[str, Callable[[], np.ndarray]] = {
        "smooth": lambda: random.standard_normal(ids) * 3,
        "tied": lambda: np.round(random.standard_normal(ids) * 2),
        "peaked": lambda: np.where(np.arange(ids) == random.integers(ids), 30.0, random.standard_normal(ids)),
        "flat": lambda: random.standard_normal(ids) * 1e-3 - 7,
        "binades": lambda: random.standard_normal(ids) * 2.0 ** random.integers(-60, 5, ids),
        "equal": lambda: np.zeros(ids),
    }
    names = draw_value(st.lists(st.sampled_from(sorted(shapes)), min_size=count, max_size=count))
    return np.stack([shapes[name]() for name in names]).astype(np.float32)
