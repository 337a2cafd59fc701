"""Alignment of a checkpoint in its released format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diagd.bundle.transformer import TransformerConfig, linear_rotary
from diagd.errors import UsageError
from diagd.export.checkpoints import Checkpoint, RandomCheckpoint, open_checkpoint, select
from diagd.export.families import Family, cosmos, identity_rules, wham
from diagd.export.families.mineworld import build, family
from diagd.schedule import Schedule, StreamLayout
from diagd.tuning.align import Report, align
from diagd.tuning.options import AlignOptions
from diagd.tuning.source import load_transformer, made_up, read_windows, write_checkpoint
from diagd.tuning.teacher_forcing import ForcedPasses, forced_nll
from tests.export.test_families_cosmos import TEXT
from tests.export.test_families_cosmos import small as small_cosmos
from tests.oracles.models import small_model

LAYOUT = StreamLayout(3, 4, after=2)


@pytest.fixture
def small() -> Family:
    config = TransformerConfig(
        layout=LAYOUT,
        context_frames=4,
        vocabulary=30,
        output_vocabulary=30,
        hidden=32,
        feed_forward=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=8,
        rotary=linear_rotary(8, 1e4),
    )
    return family("mineworld-300m", config)


def aligned(
    family: Family,
    source: Checkpoint,
    windows: NDArray[np.int64],
    options: AlignOptions,
    folder: Path,
    report: Report | None = None,
    text: NDArray[np.float32] | None = None,
) -> Path:
    """As ``Source.align`` does it with a checkpoint that is opened."""
    model = load_transformer(family, source)
    align(model, windows, options, report, text=text, frozen=made_up(family))
    return write_checkpoint(family, model, folder / "a.safetensors")


@pytest.mark.parametrize("rank", [0, 2])
def test_aligned_checkpoints_are_read_like_released_ones(small: Family, tmp_path: Path, rank: int) -> None:
    source = RandomCheckpoint(small.expected, seed=0)
    random = np.random.default_rng(0)
    np.save(tmp_path / "tokens.npy", np.tile(random.integers(0, 30, (2, LAYOUT.frame_length)), (8, 1)))
    windows = read_windows(tmp_path / "tokens.npy", small.transformer, 3)
    schedule = Schedule.chained(LAYOUT, 1)
    options = AlignOptions(((1.0, schedule),), steps=30, batch=4, rate=1e-2, rank=rank, autocast=False)
    losses: list[float] = []
    output = aligned(small, source, windows, options, tmp_path, lambda _, loss: losses.append(loss))
    assert sum(losses[-5:]) < sum(losses[:5])
    released = select(open_checkpoint(str(output)), small.rename)
    assert {name: handle.shape for name, handle in released.items()} == dict(small.expected)
    passes = ForcedPasses([schedule], 3)
    before = forced_nll(load_transformer(small, source), passes, windows, 0)
    after = forced_nll(load_transformer(small, released), passes, windows, 0)
    assert np.nanmean(after) < np.nanmean(before)


def of_every_family(name: str) -> Family:
    """A small model with everything in which the family differs."""
    if name == "world":
        config = small_model(StreamLayout(3, 4, before=1), context_frames=4).config
        return replace(
            build("mineworld-300m"), transformer=config, rules=identity_rules(config), prefixes=("",)
        )
    if name.startswith("wham"):
        config = wham.transformer_config(
            grid=(3, 4), codes=24, frames=4, hidden=32, layers=2, heads=4, bias=name == "wham with biases"
        )
        rules = wham.wham_rules(config, norm_weights=name == "wham with biases")
        return replace(build("mineworld-300m"), transformer=config, rules=rules, prefixes=("",))
    return cosmos.family("cosmos-small", small_cosmos(text="text" in name, yarn=True), None)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", ["world", "wham", "wham with biases", "cosmos", "cosmos with text"])
def test_every_family_is_aligned(name: str, rank: int, tmp_path: Path) -> None:
    model = of_every_family(name)
    layout = model.transformer.layout
    source = RandomCheckpoint(model.expected, seed=0)
    windows = np.random.default_rng(0).integers(0, 24, (6, layout.prefix + 3 * layout.frame_length))
    shares = ((0.5, Schedule.next_token(layout)), (0.5, Schedule.chained(layout, 1)))
    options = AlignOptions(shares, steps=20, batch=4, rate=1e-2, rank=rank, autocast=False)
    losses: list[float] = []
    text = np.random.default_rng(1).normal(size=(4, TEXT.width)).astype(np.float32)
    output = aligned(
        model,
        source,
        windows,
        options,
        tmp_path,
        lambda _, loss: losses.append(loss),
        text if model.transformer.text else None,
    )
    assert sum(losses[-5:]) < sum(losses[:5])
    released = select(open_checkpoint(str(output)), model.rename)
    assert {n: handle.shape for n, handle in released.items()} == dict(model.expected)
    before, after = (load_transformer(model, c).state_dict() for c in (source, released))
    changed = {n for n in before if not torch.equal(before[n], after[n].half().float())}
    assert any("qkv" in n for n in changed)
    assert not changed & {rule.target for rule in model.rules if not rule.sources}


def test_texts_that_do_not_fit_are_refused(small: Family, tmp_path: Path) -> None:
    text = np.zeros((TEXT.length, TEXT.width + 1), np.float32)
    for model, given in ((small, text), (of_every_family("cosmos with text"), text)):
        layout = model.transformer.layout
        windows = np.zeros((2, layout.prefix + 3 * layout.frame_length), np.int64)
        options = AlignOptions(((1.0, Schedule.next_token(layout)),), steps=1, batch=2)
        source = RandomCheckpoint(model.expected, seed=0)
        with pytest.raises(UsageError, match=r"text embeddings: \[6, 11\]; this model takes"):
            aligned(model, source, windows, options, tmp_path, text=given)
    assert list(tmp_path.iterdir()) == []


def test_without_a_step_that_learns_nothing_changes(small: Family, tmp_path: Path) -> None:
    source = RandomCheckpoint(small.expected, seed=0)
    windows = np.random.default_rng(0).integers(0, 30, (4, 3 * LAYOUT.frame_length))
    options = AlignOptions(((1.0, Schedule.serial(LAYOUT, 2)),), steps=1, batch=2, rate=0.0, autocast=False)
    output = aligned(small, source, windows, options, tmp_path)
    released = select(open_checkpoint(str(output)), small.rename)
    for name, handle in released.items():
        np.testing.assert_array_equal(handle.read(), source[name].read().astype(np.float16))


def test_streams_that_do_not_fit_are_refused(small: Family, tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    for tokens in (np.zeros(20, int), np.full(100, 30), np.full(100, -1)):
        np.save(path, tokens)
        with pytest.raises(UsageError, match=r"42 or more \(3 frames of 14\) in 0\.\.29"):
            read_windows(path, small.transformer, 3)
    np.save(path, np.zeros((9, LAYOUT.rows, LAYOUT.columns), int))  # frames as `encode` writes them
    with pytest.raises(
        UsageError, match=r"has shape \[9, 3, 4\]; expected .*\[frames, 14\]: of each frame the 2 known"
    ):
        read_windows(path, small.transformer, 3)
    path.write_text("no array")
    with pytest.raises(UsageError, match=r"no \.npy array"):
        read_windows(path, small.transformer, 3)
