"""``diagd world`` and ``eval`` on a world of a few frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diagd.cli.main import main
from diagd.runtime.video import VideoWriter
from tests.worlds import ACTIONS, random_world


def test_evaluations_name_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = random_world(tmp_path / "trained")
    command = ["eval", str(world), "--data", str(tmp_path), "--output", str(tmp_path / "eval")]
    assert main([*command, "--lags", "one"]) == 2
    assert "expected K:D" in capsys.readouterr().err
    assert main(command) == 2
    assert "episode-*.npz" in capsys.readouterr().err


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
    monkeypatch.setattr("diagd.cli.main.GROUP", "diagd.verbs.of.nobody")
    for verb in ("world", "eval"):
        assert main([verb, "--data", "recordings"]) == 2
        assert "run, in a clone of the repository: pip install ./worlds" in capsys.readouterr().err


def test_help_of_every_task_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["world", "train"], ["world", "collect"], ["world", "import"], ["align"], ["eval"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
        assert stopped.value.code == 0
        assert "default" in capsys.readouterr().out or command == ["world", "import"]
