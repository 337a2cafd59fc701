from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diagd.tuning.reward import Choice, Probe, RewardModel, Transitions, Verdict, measures
from diagd.tuning.rollouts import parts, with_cells
from tests.oracles.models import CODES, small_model
from tests.tuning.walks import LAYOUT, colours, walks

PROMPT, FRAMES = 2, 5


@pytest.fixture(scope="module")
def reward() -> RewardModel:
    true, model = walks(120, FRAMES), small_model(LAYOUT)
    probe = Probe.fit(Transitions.of(true, LAYOUT), model.config.vocabulary, steps=150, seed=0)
    return replace(RewardModel.learn(model.config, true, PROMPT, model), probe=probe)


def frozen(streams: np.ndarray) -> np.ndarray:
    """The same prompt and actions, and nothing happens."""
    cells, _ = parts(streams, LAYOUT)
    still = cells.copy()
    still[:, PROMPT:] = cells[:, PROMPT - 1 : PROMPT]
    return with_cells(streams, LAYOUT, still)


def noise(streams: np.ndarray) -> np.ndarray:
    cells, _ = parts(streams, LAYOUT)
    wild = cells.copy()
    wild[:, PROMPT:] = np.random.default_rng(0).integers(0, CODES, wild[:, PROMPT:].shape)
    return with_cells(streams, LAYOUT, wild)


def test_true_continuations_score_higher_than_still_and_wild_ones(reward: RewardModel) -> None:
    true = walks(40, FRAMES, seed=1)
    every = np.concatenate([true, frozen(true), noise(true)])
    figures = reward.figures(every)
    assert all(values.shape == (120, FRAMES - PROMPT) for values in figures.values())
    right, still, wild = reward.score(figures, figures).reshape(3, 40).mean(1)
    assert right > still + 0.1
    assert right > wild + 0.1


def test_what_stands_still_is_no_more_consistent_than_it_should_be() -> None:
    """Where true frames hardly keep a cell, the most that is kept is not the best."""
    true, model = colours(60, FRAMES), small_model(LAYOUT)
    judge = RewardModel.learn(model.config, true, PROMPT, model)
    figures = judge.figures(np.concatenate([true[:20], frozen(true[:20])]))
    right, still = judge._terms(figures)["consistent"].reshape(2, 20, -1).mean((1, 2))
    assert figures["consistent"][20:].min() == 1 > 2 * figures["consistent"][:20].mean()
    assert right > still + 0.4


def test_figures_are_what_can_be_counted(reward: RewardModel) -> None:
    true = walks(40, FRAMES, seed=1)
    figures, still = reward.figures(true), reward.figures(frozen(true))
    assert not still["changed"].any()
    assert still["consistent"].min() == 1
    led = parts(true, LAYOUT)[1][:, PROMPT:, 1]
    assert figures["expected"].shape == led.shape
    assert figures["consistent"].min() == 1  # walks are nothing but scrolling
    for action in np.unique(led):
        seen = figures["changed"][led == action].mean()
        assert figures["expected"][led == action] == pytest.approx(seen, abs=0.05)
    alien = true.copy()
    alien[:, LAYOUT.first_cell(PROMPT)] = CODES  # an action where a cell belongs
    assert reward.figures(alien)["known"][:, 0] == pytest.approx(1 - 1 / LAYOUT.cells)
    assert figures["known"].min() == 1


def test_the_gate_refuses_what_stands_still(reward: RewardModel) -> None:
    """However good its frames are: static bias."""
    true = walks(40, FRAMES, seed=2).reshape(20, 2, -1)
    rolled = true.copy()
    reference = reward.figures(true.reshape(40, -1))
    truth = np.full(20, 2.0)
    before = measures(reward, rolled, reference, truth)
    after = measures(reward, frozen(true.reshape(40, -1)).reshape(true.shape), reference, truth)
    assert "dynamics are lower" in Verdict.of(before, after).breaches
    assert "followed is not up" in Verdict.of(before, after).breaches


def test_choosing_by_scores_that_agree_gains_and_by_noise_does_not() -> None:
    """Contexts differ far more than the rollouts of one do, which must not count."""
    random = np.random.default_rng(0)
    contexts, aim = random.normal(0, 10, (300, 1)), random.normal(0, 1, (300, 4))
    scores, others = (contexts + aim + random.normal(0, 0.5, (300, 4)) for _ in range(2))
    told = Choice.of(scores, others, aim, 2.0)
    assert told.agreement == pytest.approx(1 / 1.25, abs=0.05)  # variance that is shared, of all
    assert 0.7 < told.gained.low < told.gained.after - told.gained.before < told.gained.high < 1.1
    noise = Choice.of(random.normal(0, 1, (300, 4)), others, aim, 2.0)
    assert abs(noise.agreement) < 0.1
    assert noise.gained.low < 0 < noise.gained.high
    assert Choice.of(np.ones((3, 2)), np.ones((3, 2)), aim[:3, :2], 2.0).agreement == 0
