from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diagd.tuning.reward import Probe, Transitions
from tests.oracles.models import CODES
from tests.tuning.walks import LAYOUT, STAY, walks


@pytest.fixture(scope="module")
def probe() -> Probe:
    seen = Transitions.of(walks(150, 6), LAYOUT)
    return Probe.fit(seen, CODES, steps=200, seed=0)


def test_it_reads_actions_of_walks_it_never_saw(probe: Probe) -> None:
    true = Transitions.of(walks(30, 6, seed=1), LAYOUT)
    likely, right = probe.read(true)
    assert likely.shape == right.shape == (150,)
    assert right.mean() > 0.95 > 0.5 > probe.commonest(true.led)
    wrong = replace(true, led=np.where(true.led == STAY, STAY + 1, STAY))
    assert probe.read(wrong)[0].mean() < 0.05 < likely.mean()


def test_an_action_that_was_never_seen_is_not_believed(probe: Probe) -> None:
    true = Transitions.of(walks(4, 3, seed=1), LAYOUT)
    likely, right = probe.read(replace(true, led=np.full_like(true.led, STAY + 2)))
    assert not likely.any()
    assert not right.any()


def test_it_is_the_same_every_time() -> None:
    seen = Transitions.of(walks(20, 4), LAYOUT)
    first, second = (Probe.fit(seen, CODES, steps=3, seed=5).read(seen)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (Probe.fit(seen, CODES, steps=3, seed=6).read(seen)[0] != first).any()


def test_transitions_have_the_action_between_their_frames() -> None:
    """One token of it stands behind the frame before, one ahead of the frame after."""
    streams = walks(2, 4)
    found = Transitions.of(streams, LAYOUT, first=2)
    assert len(found) == 4
    for window in range(2):
        for n, frame in enumerate((2, 3)):
            at = 2 * window + n
            first = LAYOUT.first_cell(frame)
            np.testing.assert_array_equal(found.led[at], streams[window, first - 2 : first])
            np.testing.assert_array_equal(
                found.after[at].ravel(), streams[window, first : first + LAYOUT.cells]
            )
            before = LAYOUT.first_cell(frame - 1)
            np.testing.assert_array_equal(
                found.before[at].ravel(), streams[window, before : before + LAYOUT.cells]
            )
