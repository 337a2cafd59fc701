"""The learned tokenizer on pictures whose patches cannot be enumerated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diagd.bundle import Bundle
from diagd.cli.main import main
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.export.families.world import CompactConfig, CompactGraphs
from diagd.tuning.recordings import Episode, FrameEncoder, load_episode
from tests.worlds.recordings import record_stripes
from worlds.folder import load_world
from worlds.model import open_model
from worlds.options import TrainOptions
from worlds.progress import Progress
from worlds.recordings import check_recipe, save_episode, shard_path
from worlds.tokenizer import (
    FittedTokenizer,
    fit_tokenizer,
    reconstruct,
    reconstruction_loss,
    train_tokenizer,
    training_frames,
)

HEIGHT, WIDTH = 24, 32
ACTIONS = ("stay", "left", "right")


def shaded_episode(frames: int, seed: int) -> Episode:
    """Colour gradients that drift sideways and down: hardly any patch occurs twice."""
    random = np.random.default_rng(seed)
    actions = random.integers(0, len(ACTIONS), frames).astype(np.uint8)
    phase = np.cumsum(np.array([0, -3, 3])[actions])[:, None, None, None] + random.uniform(0, 90)
    rows, columns = np.arange(HEIGHT)[:, None, None], np.arange(WIDTH)[:, None]
    waves = np.sin(
        (columns + phase) / np.array([7.0, 9.0, 11.0]) + (rows + np.arange(frames)[:, None, None, None]) / 8
    )
    return Episode((127 + 120 * waves).astype(np.uint8), actions)


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shades")
    check_recipe(folder, {"actions": list(ACTIONS)})
    for n in range(4):
        save_episode(shard_path(folder, n), shaded_episode(24, n))
    return folder


@pytest.fixture(scope="module")
def options(shades: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    return TrainOptions(
        shades, tmp_path_factory.mktemp("fitted"), codes=256, tokenizer_steps=60, checkpoint_every=25
    )


@pytest.fixture(scope="module")
def fitted(options: TrainOptions) -> FittedTokenizer:
    torch.set_num_threads(1)
    return fit_tokenizer(options)


def test_pictures_of_many_patches_get_a_trained_tokenizer(
    options: TrainOptions, fitted: FittedTokenizer, shades: Path, tmp_path: Path
) -> None:
    """It redraws an episode that it did not see better than at first; its log says how it went."""
    assert fitted.config is not None
    pixels = CompactGraphs(HEIGHT, WIDTH, fitted.config)
    learned = reconstruct(pixels, fitted.tensors, shades)
    untrained = train_tokenizer(replace(options, output=tmp_path, tokenizer_steps=1), pixels)
    before = reconstruct(pixels, untrained, shades)
    assert learned.psnr > before.psnr + 4
    assert learned.ssim > before.ssim
    assert 10 < learned.used <= learned.codes == 256
    losses = [json.loads(line) for line in (options.output / "tokenizer.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == list(range(1, 61))
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"]


def test_pictures_of_few_patches_keep_them(tmp_path: Path) -> None:
    data = record_stripes(tmp_path / "data", episodes=3, frames=12)
    (tmp_path / "out").mkdir()
    found = fit_tokenizer(TrainOptions(data, tmp_path / "out", codes=16, patch=4))
    assert found.config is None
    assert found.used == 8


def test_the_kind_can_be_chosen(shades: Path, tmp_path: Path) -> None:
    patches = fit_tokenizer(TrainOptions(shades, tmp_path, tokenizer="patches", codes=32))
    assert patches.config is None
    assert patches.tensors["codebook"].shape == (32, 8, 8, 3)
    with pytest.raises(UsageError, match="did you mean 'learned'"):
        TrainOptions(shades, tmp_path, tokenizer="learnt")


def test_training_is_deterministic_and_resumes_exactly(options: TrainOptions, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(progress: Progress) -> None:
        if progress.step == 8:
            raise Interrupted

    whole, parts = (
        replace(options, output=tmp_path / name, tokenizer_steps=10, checkpoint_every=5)
        for name in ("whole", "parts")
    )
    for run in (whole, parts):
        run.output.mkdir()
    expected = fit_tokenizer(whole)
    with pytest.raises(Interrupted):
        fit_tokenizer(parts, interrupt)
    again = fit_tokenizer(parts)
    assert all(torch.equal(expected.tensors[name], again.tensors[name]) for name in expected.tensors)
    lines = [json.loads(line) for line in (parts.output / "tokenizer.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 9), *range(6, 11)]
    (parts.output / "tokenizer.safetensors").unlink()
    with pytest.raises(UsageError, match="belongs to another tokenizer"):
        fit_tokenizer(replace(parts, tokenizer_steps=12))


def test_the_last_episode_is_kept_for_the_figures(shades: Path) -> None:
    frames = training_frames(shades)
    assert frames.shape == (72, HEIGHT, WIDTH, 3)
    last = load_episode(shard_path(shades, 3)).frames
    assert not any((frames == frame).all((1, 2, 3)).any() for frame in last)


def test_the_loss_prefers_what_keeps_edges() -> None:
    """Of two pictures equally far from the truth, the one with its contrast is better."""
    random = torch.Generator().manual_seed(0)
    truth = torch.rand(1, 3, 24, 24, generator=random) - 0.5
    flat = torch.full_like(truth, float(truth.mean()))
    shifted = truth + (truth - flat).abs().mean()
    torch.testing.assert_close((shifted - truth).abs().mean(), (flat - truth).abs().mean())
    assert reconstruction_loss(truth, truth) < 1e-6
    assert reconstruction_loss(shifted, truth) < 0.5 * reconstruction_loss(flat, truth)


def test_a_world_with_a_learned_tokenizer_is_trained_exported_and_scored(
    options: TrainOptions, fitted: FittedTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle's encoder graph gives the tokens that the transformer was trained on."""
    from worlds.train import train

    folder, bundle = tmp_path / "world", tmp_path / "world.diagd"
    train(
        TrainOptions(
            options.data,
            folder,
            size="0.3m",
            frames=4,
            batch=2,
            steps=2,
            codes=256,
            processes=1,
            tokenizer_steps=3,
        )
    )
    world = load_world(folder)
    assert world.description.tokenizer == CompactConfig.of_codes(256, 8)
    training = json.loads((folder / "config.json").read_text())["training"]
    assert set(training["reconstruction"]) == {"psnr", "ssim", "used", "codes"}
    assert main(["export", "--model", "world", "--checkpoint", str(folder), "--output", str(bundle)]) == 0
    frames = load_episode(shard_path(options.data, 3)).frames
    encoders = (
        FrameEncoder.of_graphs(world.description.pixel_graphs(), world.tokenizer),
        FrameEncoder.of_bundle(Bundle.open(bundle), CpuOptions(1)),
    )
    ours, theirs = (encoder.encode(frames) for encoder in encoders)
    assert (ours == theirs).mean() > 0.99
    ours_model, theirs_model = open_model(folder), open_model(bundle)
    drawn = (subject.pixels(ours.astype(np.int64)).astype(int) for subject in (ours_model, theirs_model))
    assert np.abs(np.subtract(*drawn)).max() <= 1
    with pytest.raises(UsageError, match="36x48 pixels; the tokenizer reads 24x32"):
        encoders[0].encode(np.zeros((1, 36, 48, 3), np.uint8))
