"""``diagd align`` on a world of a few frames."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import read_manifest
from diagd.cli.main import main
from diagd.tuning.recordings import Episode
from tests.cli.conftest import Refused, Workplace
from tests.worlds import ACTIONS
from worlds.recordings import check_recipe, save_episode, shard_path


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of noise."""
    folder, random = tmp_path_factory.mktemp("episodes"), np.random.default_rng(0)
    check_recipe(folder, {"actions": list(ACTIONS)})
    for n in range(2):
        frames = random.integers(0, 256, (12, 36, 48, 3), dtype=np.uint8)
        save_episode(shard_path(folder, n), Episode(frames, np.arange(12, dtype=np.uint8) % len(ACTIONS)))
    return folder


def test_aligned_worlds_are_exported_again(workplace: Workplace, recording: Path, tmp_path: Path) -> None:
    aligned, bundle = tmp_path / "aligned", tmp_path / "aligned.diagd"
    options = ["--data", str(recording), "--set", "steps=3", "--set", "frames=2", "--set", "rank=2"]
    world = shutil.copytree(workplace.world, tmp_path / "world")
    (world / "prompts").mkdir()
    (world / "prompts" / "00.png").write_bytes(b"given")
    assert main(["align", str(world), *options, "--output", str(aligned)]) == 0
    assert main(["export", "--model", "world", "--checkpoint", str(aligned), "--output", str(bundle)]) == 0
    weights = (aligned / "model.safetensors").read_bytes()
    assert weights != (workplace.world / "model.safetensors").read_bytes()
    assert (bundle / "prompts" / "00.png").read_bytes() == b"given"


def test_aligned_bundles_generate(workplace: Workplace, recording: Path, tmp_path: Path) -> None:
    aligned, tokens = tmp_path / "aligned.diagd", tmp_path / "tokens.npy"
    options = [
        "--data",
        str(recording),
        "--set",
        "steps=3",
        "--set",
        "frames=2",
        "--order",
        "k=1 chained",
        "k=2 chained",
    ]
    assert main(["align", str(workplace.bundle), *options, "--output", str(aligned)]) == 0
    command = ["generate", str(aligned), "--prompt", str(workplace.prompt)]
    assert main([*command, "--actions", str(workplace.actions), "--output", str(tokens)]) == 0
    assert (aligned / "weights.bin").read_bytes() != (workplace.bundle / "weights.bin").read_bytes()
    assert (aligned / "step.onnx").read_bytes() == (workplace.bundle / "step.onnx").read_bytes()


def test_a_bundle_is_aligned_where_its_checkpoint_is_not(
    workplace: Workplace, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its manifest says what it is, its encoder makes the tokens."""
    moved, aligned = tmp_path / "moved.diagd", tmp_path / "aligned.diagd"
    shutil.copytree(workplace.bundle, moved, copy_function=os.link)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["provenance"]["source"] = "/nowhere/model.safetensors"
    (moved / "manifest.json").unlink()  # a name of the workplace's own
    (moved / "manifest.json").write_text(json.dumps(manifest))
    options = ["--data", str(recording), "--set", "steps=1", "--set", "frames=2", "--output", str(aligned)]
    assert main(["align", str(moved), *options, "--model", "crafter-3m"]) == 2
    assert "leave --model out" in capsys.readouterr().err
    assert main(["align", str(moved), *options]) == 0
    assert read_manifest(aligned).order == "k=1 chained"  # where the export said serial
    assert read_manifest(workplace.bundle).order == "k=1 serial"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--order", "late"], "order 'late': expected 'next token', or k=N with serial, chained or d=N"),
        (["--order", "k=13 d=9"], "row lag k=13"),
        (["--order", "k=1 serial", "k=2 k=2"], "order 'k=2 k=2'"),
        (["--set", "raster=1.5"], "--set raster=1.5: Input should be less than or equal to 1"),
        (["--device", "gpu"], "device 'gpu': expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "GPUs here; train on cpu"),
        (["--batch", "0"], "batch 0"),
        (["--rate", "-1"], "--rate -1: Input should be greater than or equal to 0"),
        (["--rate", "inf"], "--rate inf: Input should be a finite number"),
        (["--set", "seed=-1"], "--set seed=-1: Input should be greater than or equal to 0"),
        (["--model", "mineworld"], "did you mean"),
    ],
)
def test_bad_alignments_name_the_fix(
    workplace: Workplace, recording: Path, tmp_path: Path, refused: Refused, options: list[str], message: str
) -> None:
    source = [str(workplace.world), "--data", str(recording)]
    refused(["align", *source, *options, "--output", str(tmp_path / "aligned")], message)


@pytest.mark.parametrize("of", ["world", "bundle"])
def test_episodes_of_actions_that_a_model_does_not_know_are_named(
    workplace: Workplace, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, refused: Refused, of: str
) -> None:
    folder, source = tmp_path_factory.mktemp("episodes"), getattr(workplace, of)
    actions = np.array([0, 1, 200, 0], np.uint8)
    save_episode(shard_path(folder, 0), Episode(np.zeros((4, 36, 48, 3), np.uint8), actions))
    message = f"{folder} has an action 200; {source} knows {len(ACTIONS)}, from 0 on"
    refused(["align", str(source), "--data", str(folder), "--output", str(tmp_path / "aligned")], message)
