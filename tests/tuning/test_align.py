from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diagd.errors import QualityError, UsageError
from diagd.schedule import RowSeed, Schedule, StreamLayout
from diagd.tuning.align import Validation, align
from diagd.tuning.options import AlignOptions
from diagd.tuning.teacher_forcing import ForcedPasses, forced_nll
from tests.oracles.models import CODES, small_model

LAYOUT = StreamLayout(3, 4, prefix=1, before=1, after=1)
CHAINED = Schedule.chained(LAYOUT, 1, RowSeed.ABOVE)


def streams(count: int) -> np.ndarray:
    """Frames whose cells count up by rows from a number the first frame shows."""
    random = np.random.default_rng(0)
    tokens = np.full((count, LAYOUT.frame_start(3)), CODES, np.int64)
    for frame in range(3):
        start = LAYOUT.first_cell(frame)
        tokens[:, start : start + LAYOUT.cells] = random.integers(0, 4, (count, 1)) + np.arange(LAYOUT.cells)
    return tokens


def gap(model: torch.nn.Module, data: np.ndarray) -> float:
    return float(np.nanmean(forced_nll(model, ForcedPasses([CHAINED], 3), data, 0)))


@pytest.mark.parametrize("rank", [0, 4])
def test_alignment_lowers_the_likelihood_gap(rank: int) -> None:
    data, model = streams(16), small_model(LAYOUT)
    names, before = set(model.state_dict()), gap(model, data)
    losses: list[float] = []
    options = AlignOptions(
        ((0.5, Schedule.next_token(LAYOUT)), (0.5, CHAINED)), steps=25, rate=5e-3, rank=rank
    )
    align(model, data, options, lambda _, loss: losses.append(loss))
    assert len(losses) == 25
    assert gap(model, data) < before - 0.5
    assert set(model.state_dict()) == names


def test_low_rank_updates_are_merged_and_low_rank() -> None:
    model = small_model(LAYOUT)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    align(model, streams(8), AlignOptions(((1.0, CHAINED),), steps=3, rate=1e-2, rank=2, autocast=False))
    changes = {name: tensor - original[name] for name, tensor in model.state_dict().items()}
    assert torch.linalg.matrix_rank(changes["layers.0.attention.qkv"], rtol=1e-4) == 2
    for name in ("embedding", "head", "norm.weight"):
        assert not changes[name].any()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_alignment_is_deterministic() -> None:
    options = AlignOptions(((1.0, CHAINED),), steps=3, rank=2)
    first, second = (align(small_model(LAYOUT), streams(8), options).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_training_that_was_interrupted_goes_on_to_the_same_weights(rank: int, tmp_path: Path) -> None:
    options = AlignOptions(((1.0, CHAINED),), steps=5, rank=rank, rate=1e-2)
    whole = align(small_model(LAYOUT), streams(8), options).state_dict()
    kept = replace(options, resume=tmp_path / "kept", keep_every=2)
    losses: list[float] = []

    def stop(step: int, loss: float) -> None:
        losses.append(loss)
        if len(losses) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align(small_model(LAYOUT), streams(8), kept, stop)
    with pytest.raises(UsageError, match="other options or data"):
        align(small_model(LAYOUT), streams(6), kept)
    steps: list[int] = []
    resumed = align(small_model(LAYOUT), streams(8), kept, lambda step, _: steps.append(step)).state_dict()
    assert steps == [3, 4, 5]  # the third was done, but not kept
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not list(tmp_path.iterdir())
    for content, reason in {b"something else": "", b"": "it is empty; remove it"}.items():
        (tmp_path / "kept").write_bytes(content)
        with pytest.raises(UsageError, match=f"no training that was kept: {reason}"):
            align(small_model(LAYOUT), streams(8), kept)


def test_a_training_that_diverges_ends_at_once(tmp_path: Path) -> None:
    """The weights kept of it are those ahead of the first loss that is no number."""
    steps: list[int] = []
    options = AlignOptions(((1.0, CHAINED),), steps=30, rate=1e30, resume=tmp_path / "kept", keep_every=1)
    with pytest.raises(QualityError, match=r"the loss of step \d+ is nan: training diverged.*--rate"):
        align(small_model(LAYOUT), streams(8), options, lambda step, _: steps.append(step))
    assert len(steps) < 5


def test_what_is_held_out_is_measured_before_and_after() -> None:
    data, model = streams(16), small_model(LAYOUT)
    before, valid = gap(model, data), Validation(data)
    align(model, streams(16), AlignOptions(((1.0, CHAINED),), steps=25, rate=5e-3), valid=valid)
    assert valid.likelihoods == {CHAINED.name: [pytest.approx(before), pytest.approx(gap(model, data))]}
    assert gap(model, data) < before - 0.5


def test_unusable_requests_are_refused() -> None:
    options = AlignOptions(((1.0, CHAINED),), steps=1)
    with pytest.raises(UsageError, match="windows of"):
        align(small_model(LAYOUT), streams(4)[:, :-1], options)
    with pytest.raises(UsageError, match="from 2 to 2, the frames of the model's context"):
        align(small_model(LAYOUT, context_frames=2), streams(4), options)
    with pytest.raises(UsageError, match="share above 0"):
        align(small_model(LAYOUT), streams(4), replace(options, shares=()))
