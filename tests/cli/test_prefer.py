"""``diagd prefer`` on a world of a few frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diagd.cli.main import main
from diagd.tuning.recordings import Episode
from tests.cli.conftest import Refused, Workplace
from tests.worlds import ACTIONS
from worlds.recordings import check_recipe, save_episode, shard_path


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames of noise whose brightness is that of the action; it is no world of the model."""
    folder, random = tmp_path_factory.mktemp("episodes"), np.random.default_rng(0)
    check_recipe(folder, {"actions": list(ACTIONS)})
    for n in range(3):
        actions = random.integers(0, len(ACTIONS), 24).astype(np.uint8)
        noise = random.integers(0, 256 // len(ACTIONS), (24, 36, 48, 3))
        frames = noise + 256 // len(ACTIONS) * actions[:, None, None, None]
        save_episode(shard_path(folder, n), Episode(frames.astype(np.uint8), actions))
    return folder


def test_figures_are_told_and_nothing_is_written_that_is_not_better(
    workplace: Workplace, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, output = tmp_path / "report.json", tmp_path / "made.diagd"
    settings = ["--set", "frames=1", "--set", "judged=8", "--set", "steps=1"]
    flags = ["--set", "contexts=4", "--set", "rollouts=2", "--set", "rate=0", "--report", str(report)]
    command = ["prefer", str(workplace.bundle), "--data", str(recording), "--output", str(output)]
    code = main([*command, *flags, *settings])
    told = capsys.readouterr()
    assert code == 1, told.err
    if report.exists():
        found = json.loads(report.read_text())
        assert set(found["verdicts"]) == {"preferences", "winners", "plain"}
        assert found["chosen"] is None
        assert "no tuned model is better" in told.err
        assert "preferences" in told.out
    else:
        assert "a probe reads" in told.err
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decoder", "late"], "order 'late'"),
        (["--set", "frames=99"], "no episode has 101 frames"),
        (["--set", "rollouts=1"], "--set rollouts=1: Input should be greater than or equal to 2"),
        (["--set", "rank=0"], "rank=0: Input should be greater than or equal to 1"),
        (["--report", "figures.txt"], ".json"),
    ],
)
def test_bad_requests_name_the_fix(
    workplace: Workplace, recording: Path, tmp_path: Path, refused: Refused, options: list[str], message: str
) -> None:
    source = [str(workplace.bundle), "--data", str(recording)]
    refused(["prefer", *source, "--output", str(tmp_path / "a.diagd"), *options], message)


def test_folders_of_worlds_are_exported_first(
    workplace: Workplace, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "prefer",
        str(workplace.world),
        "--data",
        str(recording),
        "--output",
        str(tmp_path / "a.diagd"),
    ]
    assert main(command) == 2
    assert "is no bundle" in capsys.readouterr().err
