"""Two reports against each other."""

from __future__ import annotations

import numpy as np
import pytest

from diagd.errors import UsageError
from diagd.profiling.report import compare, median_ratio
from tests.profiling.reports import lognormal, report, run


def test_noise_is_no_regression_and_a_slowdown_is() -> None:
    before = report(run("a", lognormal(1e-3, 0)), run("b", lognormal(2e-3, 1)))
    again = report(run("a", lognormal(1e-3, 2)), run("b", lognormal(2e-3, 3)))
    slower = report(run("a", lognormal(1.15e-3, 4)), run("b", lognormal(1.7e-3, 5)))
    assert [change.verdict for change in compare(before, again).changes] == ["same", "same"]
    assert not compare(before, again).regressions
    first, second = compare(before, slower).changes
    assert (first.verdict, second.verdict) == ("slower", "faster")
    assert first.low <= first.ratio <= first.high
    assert first.ratio == pytest.approx(first.after / first.before)


def test_few_samples_and_other_machines_are_told() -> None:
    before = report(run("a", [1e-3] * 3))
    after = report(run("a", [9e-3] * 3), processor="other")
    comparison = compare(before, after)
    assert comparison.changes[0].verdict == "too few"
    assert comparison.notes == ("processor differs: test and other",)
    with pytest.raises(UsageError, match="in common"):
        compare(before, report(run("b", [1e-3])))


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.2])
def test_the_interval_holds_the_true_ratio(factor: float) -> None:
    """In at least 95 of 100 draws a 99 % interval holds the ratio of the distributions' medians."""
    random, held = np.random.default_rng(1), 0
    for draw in range(100):
        before = random.lognormal(0.0, 0.1, 40)
        after = factor * random.lognormal(0.0, 0.1, 40)
        _, low, high = median_ratio(before.tolist(), after.tolist(), seed=draw)
        assert low <= high
        held += low <= factor <= high
    assert held >= 95
