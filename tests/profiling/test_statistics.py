"""Statistics against NumPy and against distributions that are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagd.profiling.statistics import describe, median_ratio, slow_ones

times = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=60)


@given(times)
def test_percentiles_are_numpys(values: list[float]) -> None:
    found = describe(values)
    expected = np.percentile(values, [50, 90, 99])
    np.testing.assert_allclose([found.p50, found.p90, found.p99], expected)
    assert found.count == len(values)
    assert found.max == max(values)
    assert found.total == pytest.approx(sum(values))
    assert found.mean * found.count == pytest.approx(found.total)


def test_jitter_is_the_mean_change() -> None:
    assert describe([1.0, 3.0, 2.0]).jitter == 1.5
    assert describe([5.0]).jitter == 0.0
    assert describe([]).count == 0


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.2])
def test_the_interval_holds_the_true_ratio(factor: float) -> None:
    """In at least 95 of 100 draws a 99 % interval holds the ratio of the distributions' medians."""
    random, held = np.random.default_rng(1), 0
    for draw in range(100):
        before = random.lognormal(0.0, 0.1, 40)
        after = factor * random.lognormal(0.0, 0.1, 40)
        ratio = median_ratio(before, after, seed=draw)
        assert ratio.low <= ratio.high
        held += ratio.low <= factor <= ratio.high
    assert held >= 95


def test_a_planted_slow_step_is_found() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(1, 5, 200)
    seconds = 0.002 * groups * random.uniform(0.9, 1.1, 200)
    assert slow_ones(seconds, groups) == []
    seconds[137] *= 5
    seconds[20] *= 8
    assert sorted(slow_ones(seconds, groups)) == [20, 137]
    assert seconds[slow_ones(seconds, groups)[0]] == seconds.max()
