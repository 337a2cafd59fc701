"""``diagd doctor``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diagd.cli.main import main
from tests.cli.conftest import Workplace


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for part in ("Python", "numpy", "processor", "memory", "cache", "GPU", "tensorrt_rtx"):
        assert part in shown, part


def test_json_has_a_line_for_each_check(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(workplace.bundle), "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert all(set(check) == {"name", "status", "found", "fix"} for check in checks)
    assert all(check["fix"] for check in checks if check["status"] != "ok")
    bundle = next(check for check in checks if check["name"] == str(workplace.bundle))
    assert "digests agree" in bundle["found"]


@pytest.mark.parametrize(
    ("verb", "code"), [(["doctor"], 1), (["profile", "{}", "--frames", "2", "--k", "1"], 2)]
)
def test_a_machine_without_a_place_for_temporary_files(
    verb: list[str], code: int, workplace: Workplace, tmp_path: Path
) -> None:
    """As a container whose root nobody may write."""
    words = [word.format(workplace.bundle) for word in verb]
    begin = "import sys, tempfile; tempfile._candidate_tempdir_list = list\nfrom diagd.cli.main import main\n"
    command = [sys.executable, "-c", f"{begin}sys.exit(main({words}))"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "set TMPDIR" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", "{}"],
        ["inspect", "{}", "--steps", "2"],
        ["plan", "{}", "--device", "thor"],
        ["verify", "{}", "--frames", "1", "--k", "1"],
        ["profile", "{}", "--frames", "2", "--k", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_machine_that_only_runs_needs_no_torch(
    workplace: Workplace, tmp_path: Path, arguments: list[str]
) -> None:
    absent = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "matplotlib", "huggingface_hub")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from diagd.cli.main import main; "
    words = [word.format(workplace.bundle) for word in arguments]
    command = [sys.executable, "-c", f"{code}sys.exit(main({words!r}))"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_damaged_bundle_is_a_problem(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.diagd"
    shutil.copytree(workplace.bundle, damaged)
    content = bytearray((damaged / "weights.bin").read_bytes())
    content[100] ^= 1
    (damaged / "weights.bin").write_bytes(content)
    assert main(["doctor", str(damaged), "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)
    assert [check["status"] for check in checks if check["name"] == str(damaged)] == ["problem"]
    assert "altered" in checks[-1]["found"]
