from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diagd.errors import UsageError
from diagd.export.transformer import Transformer
from diagd.schedule import Schedule, StreamLayout
from diagd.tuning.options import PreferTraining
from diagd.tuning.preference import Lesson, pair_weights, preference_loss, tune
from diagd.tuning.teacher_forcing import ForcedPasses, forced_nll
from tests.oracles.models import random_stream, small_model

LAYOUT = StreamLayout(3, 4, prefix=1, before=1, after=1)
SHARES = ((0.5, Schedule.next_token(LAYOUT)), (0.5, Schedule.chained(LAYOUT, 1)))
PROMPT, FRAMES = 2, 4
TRAINING = PreferTraining(SHARES, steps=8, batch=3, rate=1e-2, rank=2, autocast=False)


def lesson(count: int = 6, *, anchor: float = 0.2, strength: float = 10.0) -> Lesson:
    """Pairs that have the prompt and the actions in common."""
    preferred = np.stack([random_stream(LAYOUT, FRAMES, FRAMES, seed) for seed in range(count)])
    rejected = preferred.copy()
    for frame in range(PROMPT, FRAMES):
        start = LAYOUT.first_cell(frame)
        cells = slice(start, start + LAYOUT.cells)
        rejected[:, cells] = np.random.default_rng(frame).permutation(preferred[:, cells], axis=1)
    return Lesson(preferred, rejected, np.ones(count, np.float32), strength, anchor)


def margin(model: Transformer, taught: Lesson) -> float:
    """How much more likely the preferred are than the rejected, nats a token, by next-token prediction."""
    passes = ForcedPasses([SHARES[0][1]], FRAMES, prompt=PROMPT)
    assert taught.rejected is not None
    nll = [np.nanmean(forced_nll(model, passes, s, 0)) for s in (taught.preferred, taught.rejected)]
    return float(nll[1] - nll[0])


def test_the_loss_is_that_of_a_coin_at_first() -> None:
    """Before a step the model is its own reference, whatever the pair."""
    losses: list[float] = []
    tune(small_model(LAYOUT), lesson(anchor=0), PROMPT, TRAINING, lambda _, loss: losses.append(loss))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 0.01


def test_the_gradient_raises_the_preferred_and_lowers_the_rejected() -> None:
    model = torch.tensor([[2.0, 3.0], [2.0, 3.0]], requires_grad=True)
    loss = preference_loss(model, torch.full((2, 2), 2.5), torch.tensor([1.0, 2.0]), 2.0, 0.0)
    loss.backward()
    assert model.grad is not None
    assert (model.grad[0] > 0).all()  # descending lowers their negative log-likelihood
    assert (model.grad[1] < 0).all()
    assert model.grad[0].tolist() == pytest.approx([0.5, 1.0])  # weight * strength / 2 / pairs
    anchored = preference_loss(model, torch.full((2, 2), 2.5), torch.tensor([1.0, 2.0]), 2.0, 0.5)
    assert (anchored - loss).item() == pytest.approx(0.5 * 2.5)


def test_training_prefers_and_swapped_labels_do_the_opposite() -> None:
    taught = lesson()
    assert taught.rejected is not None
    swapped = Lesson(taught.rejected, taught.preferred, taught.weights, taught.strength, taught.anchor)
    before = margin(small_model(LAYOUT), taught)
    margins = []
    for one in (taught, swapped):
        model = small_model(LAYOUT)
        tune(model, one, PROMPT, TRAINING)
        margins.append(margin(model, taught))
    assert margins[0] > before + 0.05
    assert margins[1] < before - 0.05


def test_pairs_that_are_alike_teach_nothing() -> None:
    """What both have in common cancels: prompt, actions, and here every cell."""
    taught, model = lesson(), small_model(LAYOUT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alike = Lesson(taught.preferred, taught.preferred, taught.weights, 10.0, 0.0)
    tune(model, alike, PROMPT, TRAINING)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


def test_without_rejected_windows_it_is_plain_training() -> None:
    taught, model = Lesson.of_likelihood(lesson().preferred), small_model(LAYOUT)
    losses: list[float] = []
    tune(model, taught, PROMPT, TRAINING, lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 0.05


def test_a_training_that_was_interrupted_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    from dataclasses import replace

    whole, resumed = small_model(LAYOUT), small_model(LAYOUT)
    tune(whole, lesson(), PROMPT, TRAINING)
    keeping = replace(TRAINING, resume=tmp_path / "kept", keep_every=2)

    def stop(step: int, _: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(small_model(LAYOUT), lesson(), PROMPT, keeping, stop)
    with pytest.raises(UsageError, match="other options or data"):
        tune(small_model(LAYOUT), lesson(strength=11.0), PROMPT, keeping)
    steps: list[int] = []
    kept = tune(resumed, lesson(), PROMPT, keeping, lambda step, _: steps.append(step))
    assert steps == [5, 6, 7, 8]
    assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
    steps.clear()
    again = small_model(LAYOUT)
    tune(again, lesson(), PROMPT, keeping, lambda step, _: steps.append(step))
    assert not steps  # what was done is kept until all of it is
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_the_best_is_preferred_to_the_worst_and_ties_are_left_out() -> None:
    rolled = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    scores = np.array([[0.2, 0.9, 0.4, 0.3], [0.5, 0.5, 0.5, 0.5], [0.8, 0.1, 0.6, 0.7]])
    made = Lesson.of_scores(rolled, scores, 10.0, 0.2)
    np.testing.assert_array_equal(made.preferred, rolled[[0, 2], [1, 0]])
    np.testing.assert_array_equal(made.rejected, rolled[[0, 2], [0, 1]])
    with pytest.raises(UsageError, match="score alike"):
        Lesson.of_scores(rolled, np.full((3, 4), 0.5), 10.0, 0.2)


def test_rare_scores_weigh_more_within_bounds() -> None:
    scores = np.array([0.5] * 96 + [0.9, 0.1, 0.52, 0.48])
    weights = pair_weights(scores, np.array([0.9] + 99 * [0.5]), np.array([0.1] + 99 * [0.5]))
    assert weights[0] == 5.0
    assert weights[1:].min() >= 0.2
    assert np.unique(weights[1:]).size == 1
    even = pair_weights(np.linspace(0.005, 0.995, 100), np.array([0.9, 0.7]), np.array([0.1, 0.2]))
    np.testing.assert_allclose(even, 1)
