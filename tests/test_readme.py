"""The README's commands and Python run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(marker: str) -> str:
    found = re.search(rf"<!-- {marker}: .*?-->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no block marked {marker}"
    return found[1]


def test_commands_and_python_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in block("commands").splitlines():
        done = subprocess.run(
            command.split(),
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for name in ("crafter-3m.diagd", "walk.mp4", "walk.gif"):
        assert (tmp_path / name).exists(), name
    assert not (tmp_path / "mineworld-300m.diagd").exists()
    code = [sys.executable, "-c", block("python")]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 150


@pytest.mark.parametrize("target", re.findall(r"\]\((\w[\w./-]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert target.startswith("http") or (ROOT / target).exists(), target
