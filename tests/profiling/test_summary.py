"""Slow steps stand out from others of their width."""

from __future__ import annotations

import numpy as np

from diagd.profiling.report import slow_ones


def test_a_planted_slow_step_is_found() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(1, 5, 200)
    seconds = 0.002 * groups * random.uniform(0.9, 1.1, 200)
    assert slow_ones(seconds.tolist(), groups.tolist()) == {}
    seconds[137] *= 5
    seconds[20] *= 8
    assert sorted(slow_ones(seconds.tolist(), groups.tolist())) == [20, 137]
    assert seconds[next(iter(slow_ones(seconds.tolist(), groups.tolist())))] == seconds.max()
