"""``diagd world``, ``align`` and ``eval`` on a world of a few frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diagd.cli.main import main
from diagd.runtime.video import VideoWriter
from tests.cli.conftest import Workplace
from tests.worlds import ACTIONS


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of noise with actions beside them, imported."""
    folder = tmp_path_factory.mktemp("videos")
    random = np.random.default_rng(0)
    for name in ("one", "two"):
        with VideoWriter(folder / f"{name}.gif", 10, (36, 48)) as video:
            video.write(random.integers(0, 256, (12, 36, 48, 3), dtype=np.uint8))
        (folder / f"{name}.gif").rename(folder / f"{name}.mp4")
        lines = [json.dumps({"action": ACTIONS[n % len(ACTIONS)]}) for n in range(12)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    output = folder / "episodes"
    command = ["world", "import", str(output), "--videos", str(folder)]
    assert main([*command, "--actions", ",".join(ACTIONS), "--size", "36x48"]) == 0
    return output


def test_aligned_worlds_are_exported_again(workplace: Workplace, recording: Path, tmp_path: Path) -> None:
    aligned, bundle = tmp_path / "aligned", tmp_path / "aligned.diagd"
    options = ["--data", str(recording), "--steps", "3", "--frames", "2", "--rank", "2"]
    assert main(["align", str(workplace.world), *options, "--output", str(aligned)]) == 0
    assert main(["export", "--model", "world", "--checkpoint", str(aligned), "--output", str(bundle)]) == 0
    weights = (aligned / "model.safetensors").read_bytes()
    assert weights != (workplace.world / "model.safetensors").read_bytes()


def test_aligned_bundles_generate(workplace: Workplace, recording: Path, tmp_path: Path) -> None:
    aligned, tokens = tmp_path / "aligned.diagd", tmp_path / "tokens.npy"
    options = ["--data", str(recording), "--steps", "3", "--frames", "2", "--k", "1", "2", "--d", "chained"]
    assert main(["align", str(workplace.bundle), *options, "--output", str(aligned)]) == 0
    command = ["generate", str(aligned), "--prompt", str(workplace.prompt)]
    assert main([*command, "--actions", str(workplace.actions), "--output", str(tokens)]) == 0
    assert (aligned / "weights.bin").read_bytes() != (workplace.bundle / "weights.bin").read_bytes()
    assert (aligned / "step.onnx").read_bytes() == (workplace.bundle / "step.onnx").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--d", "late"], "--d late: expected serial"),
        (["--k", "13", "--d", "9"], "row lag k=13"),
        (["--k", "1", "2", "2", "--d", "serial", "chained"], "3 row lags but 2 frame lags"),
        (["--raster", "1"], "--raster 1.0"),
        (["--model", "mineworld"], "did you mean"),
    ],
)
def test_bad_alignments_name_the_fix(
    workplace: Workplace,
    recording: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    source = [str(workplace.world), "--data", str(recording)]
    assert main(["align", *source, *options, "--output", str(tmp_path / "aligned")]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_evaluations_name_what_is_missing(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(workplace.world), "--data", str(tmp_path), "--output", str(tmp_path / "eval")]
    assert main([*command, "--lags", "one"]) == 2
    assert "expected K:D" in capsys.readouterr().err
    assert main(command) == 2
    assert "episode-*.npz" in capsys.readouterr().err


def test_help_of_every_task_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["world", "train"], ["world", "collect"], ["world", "import"], ["align"], ["eval"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
        assert stopped.value.code == 0
        assert "default" in capsys.readouterr().out or command == ["world", "import"]
