"""The fault runs find what is wrong, and nothing where nothing is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.faults import Place, check, litter


def test_processes_that_race_on_a_cold_cache_agree() -> None:
    command = ["benchmarks.faults", "--part", "race", "--processes", "3", "--rounds", "2"]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2].split("│")[1:6] == [
        " 3         ",
        " 2      ",
        " 6    ",
        " 0      ",
        " 0            ",
    ]


def test_damage_and_litter_are_seen(tmp_path: Path) -> None:
    bundle = tmp_path / "out.diagd"
    bundle.mkdir()
    assert "has no manifest" in str(check("export", tmp_path))
    bundle.rmdir()
    assert check("generate", tmp_path) is None
    assert check("calibrate", tmp_path) == "a file of the user is gone"
    (tmp_path / "out.mp4").write_bytes(b"half of it")
    assert check("generate", tmp_path) == "the video is cut"
    assert litter(tmp_path) == []
    (tmp_path / ".out.mp4.0123abcd.1.0a1b2c.partial.mp4").touch()
    assert len(litter(tmp_path)) == 1
    assert Place(tmp_path).command("build", tmp_path)[:2] == ["build", str(bundle)]
