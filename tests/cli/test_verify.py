"""``diagd verify``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import read_manifest, seal
from diagd.cli.main import main
from tests.cli.conftest import Workplace

QUICK = ["--frames", "2", "--set", "threads=1"]


def test_a_bundle_against_itself(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(workplace.bundle), *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "ok" in shown
    assert "failed" not in shown


def test_json_has_a_verdict_for_each_order(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--engine", "prefix", "--k", "1,2,3", "--frames", "2", "--json"]
    assert main(["verify", str(workplace.bundle), *options]) == 0
    found = json.loads(capsys.readouterr().out)["verdicts"]
    assert len(found) == 7
    assert all(verdict["passed"] and verdict["engine"] == "prefix fp32" for verdict in found)


@pytest.fixture(scope="module")
def altered(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose digests agree, but whose weights are not those of the workplace's."""
    bundle = tmp_path_factory.mktemp("altered") / "altered.diagd"
    shutil.copytree(workplace.bundle, bundle)
    file = bundle / "weights.bin"
    numbers = np.fromfile(file, np.uint8)
    numbers[: len(numbers) // 2 // 4 * 4].view(np.float32)[:] *= np.float32(1.3)
    numbers.tofile(file)
    seal(bundle, read_manifest(bundle))
    return bundle


def test_altered_weights_end_with_code_1(
    workplace: Workplace, altered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--reference", str(workplace.bundle), *QUICK, "--json"]
    assert main(["verify", str(altered), *options]) == 1
    found = json.loads(capsys.readouterr().out)["verdicts"]
    assert not any(verdict["passed"] for verdict in found)
    assert all(verdict["error"] > 1e-3 for verdict in found)


def test_a_prompt_from_a_file(
    workplace: Workplace, altered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How far other weights are off depends on what they see."""
    layout, tokens = read_manifest(workplace.bundle).layout, tmp_path / "tokens.npy"
    np.save(tokens, np.ones((3, layout.rows, layout.columns), np.int32))
    errors = []
    for prompt in (workplace.prompt, tokens, tokens):
        options = [
            "--prompt",
            str(prompt),
            "--reference",
            str(workplace.bundle),
            "--k",
            "1",
            *QUICK,
            "--json",
        ]
        assert main(["verify", str(altered), *options]) == 1
        errors.append([verdict["error"] for verdict in json.loads(capsys.readouterr().out)["verdicts"]])
    assert errors[0] != errors[1] == errors[2]


def test_tensors_of_one_step(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(workplace.bundle), *QUICK, "--k", "1", "--tensors"]) == 0
    assert "nothing to compare by tensor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "prefx"], "did you mean 'prefix'"),
        (["--k", "x"], "--k x: expected whole numbers such as"),
        (["--frames", "0"], "--frames 0: Input should be greater than or equal to 1"),
        (["--frames", "1" + "0" * 20], "less than or equal to 1000000"),
        (["--set", "prompt_frames=1" + "0" * 20], "less than or equal to 1000000"),
        (["--set", "window=1"], "window"),
        (["--set", "seed=-1"], "--set seed=-1: Input should be greater than or equal to 0"),
        (["--reference", "absent.diagd"], "no bundle"),
        (["--prompt", "absent.npy"], "no .npy array"),
    ],
)
def test_mistakes_are_told(
    workplace: Workplace, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(workplace.bundle), *arguments]) == 2
    assert message in capsys.readouterr().err
