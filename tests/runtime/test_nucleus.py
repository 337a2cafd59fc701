"""The threshold of top-p against sorted rows, for rows of every kind side by side."""

from __future__ import annotations

import numpy as np
import pytest

from diagd.runtime import nucleus
from diagd.runtime.sampling import exponentials

IDS = 8192


def rows_of_every_kind(seed: int) -> np.ndarray:
    """Flat, peaked, sorted, tied, far from zero, and unlike what every sixteenth id shows."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal((8, IDS)).astype(np.float32)
    outlier = np.zeros(IDS, np.float32)
    outlier[1::16] = 9
    unlike = np.where(random.random(IDS) < 0.5, np.log(0.1), np.log(2)) + 0.01 * normal[7]
    unlike[::16] = np.log(random.uniform(0.9, 1.1, IDS // 16))
    kinds = [
        0.3 * normal[0],
        6 * normal[1],
        np.sort(normal[2]),
        np.round(2 * normal[3], 1),
        normal[4] - 300,
        2.5 * normal[5] + 120,
        outlier + 0.1 * normal[6],
        unlike,
    ]
    return np.stack(kinds).astype(np.float32)


def sorted_floor(logits: np.ndarray, top_p: float, temperature: float, *, keep_crossing: bool) -> float:
    """Smallest kept logit, from sums in float64 over groups of equal logits."""
    values, counts = np.unique(logits, return_counts=True)
    weights = counts * np.exp((values.astype(np.float64) - values[-1]) / temperature)
    heavier = np.cumsum(weights[::-1])[::-1] - weights
    reached = heavier if keep_crossing else heavier + weights
    kept = values[reached <= top_p * weights.sum()]
    return float(kept.min(initial=values[-1]))


@pytest.mark.parametrize("keep_crossing", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.95, 0.999])
def test_the_kept_set_is_that_of_sorted_rows(top_p: float, temperature: float, keep_crossing: bool) -> None:
    logits = rows_of_every_kind(seed=int(1000 * top_p))
    weights, total, shift = exponentials(logits, temperature)
    top = None if keep_crossing else logits.max(axis=1)
    floors = nucleus.nucleus_floors(logits, weights, total, shift, top_p, temperature, top)
    for row, floor in zip(logits, floors, strict=True):
        kept = row >= floor
        expected = row >= sorted_floor(row, top_p, temperature, keep_crossing=keep_crossing)
        # One id may change sides where the sum meets p to seven digits.
        assert np.count_nonzero(kept != expected) <= (1 if 0 < kept.mean() < 1 else 0)


def test_rows_that_the_sample_misjudges_are_found_out() -> None:
    logits = rows_of_every_kind(seed=0)
    weights, total, _ = exponentials(logits, 1.0)
    allowed = 0.8 * total
    places, ahead, missed = nucleus._bracket(weights, total, allowed)
    inside = np.bincount(places // IDS, weights.reshape(-1)[places], len(logits))
    crossing = (ahead <= allowed) & (ahead + inside > allowed)
    assert missed.tolist() == (~crossing).tolist()
    assert missed.any()
    assert not missed.all()


def test_weights_far_from_one_are_shifted_row_by_row() -> None:
    logits = rows_of_every_kind(seed=1)
    weights, total, shift = exponentials(logits, 1.0)
    assert np.flatnonzero(shift).tolist() == [4, 5]
    exact = np.exp(logits.astype(np.float64) - shift[:, None])
    np.testing.assert_allclose(weights, exact, rtol=1e-5)
    np.testing.assert_allclose(total, exact.sum(axis=1), rtol=1e-5)
