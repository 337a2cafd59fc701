from __future__ import annotations

import numpy as np
import pytest

from diagd.tuning.reward import Change, Measures, Verdict


def model(**changed: float) -> Measures:
    """Figures of 64 contexts, with some of them moved, and a little noise of their own."""
    figures = {"followed": 0.6, "score": 0.5, "changed": 0.3, "distinct": 0.2, "unknown": 0.01, "truth": 2.0}
    made = {}
    for n, (name, value) in enumerate(figures.items()):
        shared = np.random.default_rng(n).normal(value, 0.1 * value, 64)
        own = np.random.default_rng(n + 100 + 10 * len(changed)).normal(0, 0.005 * value, 64)
        made[name] = shared + own + changed.get(name, 0.0)
    return made


def test_what_follows_its_actions_better_and_is_else_as_it_was_passes() -> None:
    verdict = Verdict.of(model(), model(followed=0.02))
    assert verdict.breaches == []
    change = verdict.changes["followed"]
    assert 0 < change.low < change.after - change.before < change.high


@pytest.mark.parametrize(
    ("changed", "breach"),
    [
        ({}, "followed is not up"),
        ({"followed": 0.02, "truth": 0.05}, "NLL of true frames may be up"),
        ({"followed": 0.02, "changed": -0.03}, "dynamics are lower"),
        ({"followed": 0.02, "distinct": -0.03}, "rollouts are less distinct"),
        ({"followed": 0.02, "unknown": 0.005}, "unknown ids are up"),
    ],
)
def test_each_breach_refuses(changed: dict[str, float], breach: str) -> None:
    (found,) = Verdict.of(model(), model(**changed)).breaches
    assert breach in found


def test_where_no_action_can_be_read_the_score_has_to_rise() -> None:
    before, after = model(), model(score=0.02)
    for one in (before, after):
        del one["followed"]
    assert Verdict.of(before, after).breaches == []
    assert Verdict.of(before, before).breaches == ["score is not up"]


def test_the_interval_is_that_of_the_paired_difference() -> None:
    """Contexts differ much more than a context before and after does."""
    random = np.random.default_rng(0)
    before = random.normal(10, 3, 200)
    change = Change.of(before, before + random.normal(0.1, 0.2, 200))
    assert 0.05 < change.low < 0.1 < change.high < 0.15
    relative = Change.of(before, before * 1.02, relative=True)
    assert (relative.low, relative.high) == pytest.approx((0.02, 0.02))
