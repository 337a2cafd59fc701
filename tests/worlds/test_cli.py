"""``diagd world`` and ``eval`` on a world of a few frames."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from diagd.cli.main import main
from diagd.runtime.video import VideoWriter
from diagd.tuning.recordings import Episode
from tests.worlds import ACTIONS, random_world
from worlds.cli.world import print_step
from worlds.progress import Progress
from worlds.recordings import check_recipe, save_episode, shard_path


def test_evaluations_name_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = random_world(tmp_path / "trained")
    command = ["eval", str(world), "--data", str(tmp_path), "--output", str(tmp_path / "eval")]
    assert main([*command, "--order", "one"]) == 2
    assert "order 'one': expected 'next token', or k=N" in capsys.readouterr().err
    assert main(command) == 2
    assert "episode-*.npz" in capsys.readouterr().err


def test_a_training_tells_a_file_now_and_then_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 81):
        print_step(Progress(step, 80, 0.5, float(step)))
    assert capsys.readouterr().out.splitlines() == [
        "transformer 30/80  loss 0.5000  about 50 s left",
        "transformer 60/80  loss 0.5000  about 20 s left",
        "transformer 80/80  loss 0.5000",
    ]


def test_videos_are_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random, output = np.random.default_rng(0), tmp_path / "episodes"
    for name in ("one", "two"):
        with VideoWriter(tmp_path / f"{name}.gif", 10, (36, 48)) as video:
            video.write(random.integers(0, 256, (12, 36, 48, 3), dtype=np.uint8))
        (tmp_path / f"{name}.gif").rename(tmp_path / f"{name}.mp4")
        lines = [json.dumps({"action": ACTIONS[n % len(ACTIONS)]}) for n in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    command = ["world", "import", str(output), "--videos", str(tmp_path)]
    assert main([*command, "--actions", ",".join(ACTIONS), "--size", "36x48"]) == 0
    assert "2 new episodes" in capsys.readouterr().out


def test_a_missing_package_names_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("diagd.cli.verbs.GROUP", "diagd.verbs.of.nobody")
    for verb in ("world", "eval"):
        assert main([verb, "--data", "recordings"]) == 2
        assert "run, in a clone of the repository: pip install ./worlds" in capsys.readouterr().err


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of no known geometry: two episodes of 3 x 4 cells."""
    folder = tmp_path_factory.mktemp("noise")
    check_recipe(folder, {"actions": list(ACTIONS)})
    for n in range(2):
        frames = np.random.default_rng(n).integers(0, 256, (8, 12, 16, 3), dtype=np.uint8)
        save_episode(shard_path(folder, n), Episode(frames, np.arange(8, dtype=np.uint8) % len(ACTIONS)))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of 3 x 4 cells, its bundle beside it."""
    folder = random_world(tmp_path_factory.mktemp("small") / "trained", rows=3, columns=4)
    bundle = str(folder.parent / "small.diagd")
    assert main(["export", "--model", "world", "--checkpoint", str(folder), "--output", bundle]) == 0
    return folder


EVAL = ["--set", "rollouts=2", "--set", "windows=2", "--set", "frames=1"]


def test_other_worlds_are_measured_by_what_holds_for_any(
    small: Path, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In PyTorch and on the engine, whose bundle encodes the recording by its own codebook."""
    found = {}
    for model in (small, small.parent / "small.diagd"):
        output = tmp_path / model.name
        assert main(["eval", str(model), "--data", str(noise), "--output", str(output), *EVAL]) == 0
        assert "known for recordings of Crafter" in " ".join(capsys.readouterr().out.split())
        assert (output / "contact.png").exists()
        scores = json.loads((output / "eval.json").read_text())["schedules"]
        assert [(s["name"], s["geometry"]) for s in scores] == [
            (name, None) for name in ("next token", "k=1 chained", "k=1 serial", "k=2 serial")
        ]
        found[model.name] = [s["nll"]["mean"] for s in scores]
    assert found["trained"] == pytest.approx(found["small.diagd"], abs=1e-3)


def test_a_precision_is_one_of_the_bundle(
    small: Path, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(noise), *EVAL]
    bundle = str(shutil.copytree(small.parent / "small.diagd", tmp_path / "bundle"))
    precise, coarse = tmp_path / "precise", tmp_path / "coarse"
    assert main(["eval", bundle, *command, "--output", str(coarse), "--precision", "int4-weight"]) == 2
    assert "has no int4-weight graph (it has fp32)" in capsys.readouterr().err
    prompt = tmp_path / "prompt.npy"
    np.save(prompt, np.random.default_rng(0).integers(0, 30, (4, 3, 4)).astype(np.int32))
    scheme = ["--precision", "int4-weight", "--data", str(prompt), "--budget", "none", "--set", "steps=64"]
    assert main(["calibrate", bundle, *scheme]) == 0
    for precision, output in (("fp32", precise), ("int4-weight", coarse)):
        assert main(["eval", bundle, *command, "--output", str(output), "--precision", precision]) == 0
    first, second = (json.loads((o / "eval.json").read_text())["schedules"] for o in (precise, coarse))
    assert first[0]["nll"]["mean"] != second[0]["nll"]["mean"]
    assert main(["eval", str(small), *command, "--output", str(coarse), "--precision", "fp32"]) == 2
    assert "--precision fp32 is for bundles" in capsys.readouterr().err


def test_decoders_are_compared_by_speed_and_quality(
    small: Path, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both ends of the knob, the bars between and the controls; exact ones are next-token prediction's."""
    bundle, output = str(small.parent / "small.diagd"), tmp_path / "pareto"
    command = ["eval", bundle, "--data", str(noise), "--output", str(output), "--set", "rollouts=2"]
    command += ["--set", "prompt=1", "--set", "frames=5", "--set", "threads=1"]
    names = ("next token", "k=1 serial", "jacobi", "draft")
    assert main([*command, "--set", "drafter_decoder=k=1 serial", "--decoders", *names]) == 0
    assert "jacobi" in capsys.readouterr().out
    assert (output / "pareto.png").stat().st_size > 5_000
    found = {point["name"]: point for point in json.loads((output / "pareto.json").read_text())["decoders"]}
    assert sum(point["curve"] == "draft" for point in found.values()) >= 3  # equal bars share a name
    assert sum(point["curve"] == "mean" for point in found.values()) == 3
    for name in ("next token", "jacobi", "target"):
        assert found[name]["judgement"]["ntp_match"]["mean"] == 1
        assert found[name]["exact"] == 1
    assert found["drafter"]["judgement"] == found["k=1 serial"]["judgement"]
    assert 0 < found["drafter"]["exact"] == found["k=1 serial"]["exact"] < 1
    assert (found["drafter"]["kept"], found["target"]["kept"], found["jacobi"]["kept"]) == (1, 0, None)
    assert any(point["best"] for point in found.values())
    assert main([*command, "--decoders", "fastest"]) == 2
    assert "order 'fastest'" in capsys.readouterr().err


def test_drift_needs_no_known_geometry(
    small: Path, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(small), "--data", str(noise), "--output", str(tmp_path), *EVAL]
    assert main([*command, "--set", "long_frames=10", "--set", "probe_steps=2"]) == 0
    assert "diagd world collect" in capsys.readouterr().out  # where its geometry is known
    found = json.loads((tmp_path / "eval.json").read_text())
    assert 0 <= found["probe"]["commonest"] <= 1
    for schedule in found["schedules"]:
        assert 0 <= schedule["recovered"]["mean"] <= 1
        drift = found["drift"][schedule["name"]]
        assert drift["frames"][-1] == 10 + found["options"]["prompt"]
        assert drift["scores"] == []
        assert len(drift["recovered"]) == len(drift["dynamics"]) == len(drift["frames"])


def test_help_of_every_task_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["world", "train"], ["world", "collect"], ["world", "import"], ["align"], ["eval"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
        assert stopped.value.code == 0
        assert "default" in capsys.readouterr().out or command == ["world", "import"]
