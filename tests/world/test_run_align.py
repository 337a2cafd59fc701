from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diagd.calibration.forced_batch import ForcedPasses, forced_nll
from diagd.errors import UsageError
from diagd.schedule import Schedule, StreamLayout
from diagd.world.dataset import cached_tokens
from diagd.world.model import load_world
from diagd.world.run_align import AlignRun, run_align
from diagd.world.train import TrainOptions, train
from tests.world.recordings import PATCH, record_stripes


def test_a_world_is_aligned_to_a_schedule(tmp_path: Path) -> None:
    data = record_stripes(tmp_path / "data", episodes=8, frames=10)
    options = TrainOptions(data, tmp_path / "base", size="0.7m", mixture="ntp", codes=8, patch=PATCH)
    train(replace(options, frames=4, batch=8, steps=12, processes=1))
    run = AlignRun(
        tmp_path / "base", data, tmp_path / "aligned", lags=((1, 3),), windows=32, steps=12, rate=3e-3
    )
    losses: list[float] = []
    run_align(run, lambda _, loss: losses.append(loss))
    base, aligned = load_world(run.model), load_world(run.output)
    assert aligned.description == base.description
    streams = cached_tokens(data, base.codebook).windows(np.array([0, 20]), 4)
    passes = ForcedPasses([Schedule.chained(base.description.layout, 1)], 4, score_prompt=False)
    before, after = (np.nanmean(forced_nll(world.model, passes, streams, 0)) for world in (base, aligned))
    assert len(losses) == 12
    assert after < before - 0.1
    assert json.loads((run.output / "config.json").read_text())["training"]["aligned"]["lags"] == [[1, 3]]
    assert not torch.equal(base.model.head, aligned.model.head)


def test_shares_add_up() -> None:
    run = AlignRun(Path("m"), Path("d"), Path("o"), lags=((1, 9), (2, 28)), ntp_share=0.5)
    layout = StreamLayout(9, 12, before=1)
    shares = run.shares(layout)
    assert [share for share, _ in shares] == [0.5, 0.25, 0.25]
    assert shares[0][1] == Schedule.next_token(layout)
    control = replace(run, lags=(), ntp_share=1.0)
    assert len(control.shares(layout)) == 1
    with pytest.raises(UsageError, match="next-token share"):
        replace(run, lags=(), ntp_share=0.5)
