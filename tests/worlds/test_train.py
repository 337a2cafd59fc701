from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diagd.errors import CheckpointError, UsageError
from diagd.export.families import find
from diagd.export.families.world import WorldDescription
from diagd.export.transformer import Transformer
from diagd.tuning.recordings import FrameEncoder, cached_tokens
from diagd.tuning.teacher_forcing import ForcedPasses, forced_loss, forced_nll
from tests.worlds.recordings import ACTIONS, COLUMNS, PATCH, ROWS, record_stripes
from worlds.folder import load_world, save_world
from worlds.options import MIXTURES, TrainOptions, worker_devices
from worlds.progress import Progress, learning_rate
from worlds.recordings import RECIPE
from worlds.train import Optimiser, mixture_shares, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_stripes(tmp_path_factory.mktemp("stripes"), episodes=12, frames=12)


def options(data: Path, output: Path, **changes: object) -> TrainOptions:
    plain = TrainOptions(
        data,
        output,
        size="0.7m",
        frames=4,
        batch=8,
        steps=6,
        codes=8,
        patch=PATCH,
        processes=1,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_world(folder).model.state_dict())


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_learns_every_schedule(data: Path, tmp_path: Path) -> None:
    """The actions alone decide the new columns, so a model that learned the world knows every token."""
    train(options(data, tmp_path, steps=60))
    world = load_world(tmp_path)
    assert world.description.used_codes == 8
    encoder = FrameEncoder.of_graphs(world.description.pixel_graphs(), world.tokenizer)
    streams = cached_tokens(data, encoder).windows(np.array([0, 15, 30]), 4)
    shares = mixture_shares("mixture", world.description.layout)
    passes = ForcedPasses([schedule for _, schedule in shares], 4)
    for choice in range(len(shares)):
        assert np.nanmean(forced_nll(world.model, passes, streams, choice)) < 0.5 * np.log(8)
    found = losses(tmp_path)
    assert len(found) == 60
    assert found[-1] < 0.5 * found[0]


def test_training_is_deterministic_and_resumes_exactly(data: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(progress: Progress) -> None:
        if progress.step == 5:
            raise Interrupted

    train(options(data, tmp_path / "whole"))
    with pytest.raises(Interrupted):
        train(options(data, tmp_path / "parts", checkpoint_every=4), interrupt)
    train(options(data, tmp_path / "parts", checkpoint_every=4))
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_two_processes_train_together(data: Path, tmp_path: Path) -> None:
    train(options(data, tmp_path / "one", steps=2))
    train(options(data, tmp_path / "two", steps=2, processes=2))
    first, second = (losses(tmp_path / name) for name in ("one", "two"))
    assert first == pytest.approx(second, rel=2e-3)  # products are in bfloat16
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    initial = Transformer(load_world(tmp_path / "one").description.transformer_config())
    initial.initialise(torch.Generator().manual_seed(0))
    for name, start in initial.state_dict().items():
        moved = (one[name] - start).norm()
        assert (one[name] - two[name]).norm() < 0.3 * moved + 1e-3


@pytest.mark.slow
def test_torchrun_trains_what_one_process_does(data: Path, tmp_path: Path) -> None:
    train(options(data, tmp_path / "one", steps=2))
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "diagd"]
    command = ["world", "train", str(tmp_path / "two"), "--data", str(data), "--size", "0.7m", "--batch", "8"]
    settings = ["frames=4", "codes=8", f"patch={PATCH}"]
    told = [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, *run, *command, "--steps", "2", *told], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 0.7m in 2 steps") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)


def test_no_two_processes_share_a_gpu() -> None:
    assert worker_devices("cpu", None, 0) == ["cpu", "cpu"]
    assert worker_devices("cpu", 3, 0) == ["cpu"] * 3
    assert worker_devices("cuda", None, 1) == ["cuda:0"]
    assert worker_devices("cuda", None, 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert worker_devices("cuda", 2, 4) == ["cuda:0", "cuda:1"]
    assert worker_devices("cuda:1", None, 4) == ["cuda:1"]
    for device, processes, gpus in (("cuda", 2, 1), ("cuda:1", 2, 4), ("cpu", 0, 0)):
        with pytest.raises(UsageError, match=f"{processes} processes on {device}"):
            worker_devices(device, processes, gpus)


def test_a_missing_device_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected cpu, cuda or cuda:N"):
        options(data, tmp_path, device="gpu")
    with pytest.raises(UsageError, match="GPUs here"):
        options(data, tmp_path, device="cuda:99")


def test_a_checkpoint_of_another_recipe_is_refused(data: Path, tmp_path: Path) -> None:
    train(options(data, tmp_path, steps=2, checkpoint_every=1))
    with pytest.raises(UsageError, match="another recipe"):
        train(options(data, tmp_path, steps=3, checkpoint_every=1))


def test_a_finished_model_is_not_replaced(data: Path, tmp_path: Path) -> None:
    """Not by another training; its own finds nothing to do, but cannot tell where its checkpoint is gone."""
    train(options(data, tmp_path, steps=2))
    model, log = (tmp_path / "model.safetensors").read_bytes(), losses(tmp_path)
    with pytest.raises(UsageError, match="another recipe"):
        train(options(data, tmp_path, steps=2, seed=1))
    train(options(data, tmp_path, steps=2))
    assert losses(tmp_path) == log
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(UsageError, match="holds a finished model"):
        train(options(data, tmp_path, steps=2, seed=1))
    assert (tmp_path / "model.safetensors").read_bytes() == model


def test_a_fixed_batch_is_learned(data: Path) -> None:
    description = WorldDescription("0.7m", ROWS, COLUMNS, PATCH, 8, 8, ACTIONS, 4)
    model = Transformer(description.transformer_config()).initialise(torch.Generator().manual_seed(1))
    optimiser = Optimiser(model, 0.02, 3e-3)
    random = np.random.default_rng(0)
    streams = random.integers(0, 8, (4, 3 * description.layout.frame_length))
    passes = ForcedPasses([s for _, s in mixture_shares("mixture", description.layout)], 3, score_prompt=True)
    batch = passes.batch(streams, [0, 1, 2, 3])
    losses = []
    for _ in range(6):
        loss = forced_loss(model, batch)
        loss.backward()
        optimiser.step(1.0)
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[-1] < losses[0] - 0.5


def test_learning_rate_rises_holds_and_falls() -> None:
    rates = [learning_rate(step, 1000) for step in range(1, 1001)]
    assert rates[59] == 1.0
    assert rates[29] == 0.5
    assert set(rates[59:300]) == {1.0}
    assert rates[649] == pytest.approx(0.5)
    assert rates[-1] == 0


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_shares_are_whole(name: str) -> None:
    description = WorldDescription("3m", 9, 12, 8, 512, 100, ACTIONS, 8)
    assert sum(share for share, _ in mixture_shares(name, description.layout)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"mixture": "mixtures"}, "did you mean 'mixture'"), ({"size": "4m"}, "10m"), ({"batch": 0}, "batch 0")],
)
def test_what_cannot_be_trained_makes_no_folder(
    change: dict[str, object], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        train(options(data, tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [('{"actions": ["stay"]}', r"has an action [12]; .* names 1"), ("{}", "of episodes of your own")],
)
def test_actions_without_a_name_are_told_before_the_tokenizer_is_trained(
    recipe: str, message: str, tmp_path: Path
) -> None:
    data = record_stripes(tmp_path / "data", episodes=2, frames=6)
    (data / RECIPE).write_text(recipe)
    with pytest.raises(UsageError, match=message):
        train(options(data, tmp_path / "out", tokenizer="learned", tokenizer_steps=1))
    assert not (tmp_path / "out").exists()


def test_unknown_names_are_answered_with_the_known_ones(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"3m"):
        train(options(data, tmp_path, size="3mm"))
    with pytest.raises(UsageError, match="did you mean 'mixture'"):
        mixture_shares("mixtures", WorldDescription("3m", 9, 12, 8, 512, 9, ACTIONS, 8).layout)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no readable world model"):
        load_world(tmp_path)


def test_saving_keeps_half_precision(data: Path, tmp_path: Path) -> None:
    train(options(data, tmp_path / "a", steps=1))
    prompts = find("world", str(tmp_path / "a")).prompts
    assert prompts is not None and len(list(prompts.glob("*.png"))) == 12
    world = load_world(tmp_path / "a")
    save_world(tmp_path / "b", world, {"note": "copy"})
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    assert load_world(tmp_path / "b").description == world.description
