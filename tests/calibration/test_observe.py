"""Statistics do not depend on how rows come in steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagd.calibration.search import (
    SAMPLE_ROWS,
    InputStatistics,
    load_statistics,
    row_keys,
    save_statistics,
)
from diagd.errors import QualityError

ROWS = np.random.default_rng(0).standard_normal((600, 5)).astype(np.float32)


def collected(cuts: list[int]) -> InputStatistics:
    seen = InputStatistics.empty(5)
    for part in np.split(ROWS, sorted(cuts)):
        seen.add("w", part, seed=3)
    return seen


@given(st.lists(st.integers(0, 600), max_size=8))
def test_batching_changes_nothing(cuts: list[int]) -> None:
    whole, parts = collected([]), collected(cuts)
    assert parts.rows == 600
    assert np.array_equal(whole.absmax, np.abs(ROWS).max(0))
    assert np.array_equal(parts.absmax, whole.absmax)
    assert np.array_equal(parts.sample, whole.sample)
    assert np.allclose(parts.mean_square, (ROWS**2).mean(0), rtol=1e-5)


def test_the_sample_is_spread_over_all_rows() -> None:
    sample = collected([]).sample
    assert len(sample) == SAMPLE_ROWS
    places = [int(np.flatnonzero((row == ROWS).all(1))[0]) for row in sample]
    assert len(set(places)) == SAMPLE_ROWS
    assert np.histogram(places, 3, (0, 600))[0].min() > 60


def test_keys_depend_on_seed_and_index_only() -> None:
    assert np.array_equal(row_keys(1, 0, 20)[12:], row_keys(1, 12, 8))
    assert not np.array_equal(row_keys(1, 0, 20), row_keys(2, 0, 20))


def test_numbers_that_are_not_finite_are_refused_by_name() -> None:
    broken = ROWS.copy()
    broken[5, 2] = np.nan
    with pytest.raises(QualityError, match=r"layers.3.*step 1"):
        InputStatistics.empty(5).add("layers.3", broken, seed=0)


def test_what_is_stored_is_what_was_seen(tmp_path: Path) -> None:
    seen = {"w": collected([])}
    save_statistics(tmp_path / "statistics.npz", seen)
    read = load_statistics(tmp_path / "statistics.npz")["w"]
    assert np.array_equal(read.absmax, seen["w"].absmax)
    assert np.array_equal(read.mean_square, seen["w"].mean_square)
    assert len(read.sample) == 0
