"""What a killed run leaves beside its output, and what the next one does with it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diagd.bundle.files import atomic_directory, atomic_file, clear_leftovers

WRITER = """
import sys, time
from pathlib import Path
from diagd.bundle import files
with getattr(files, sys.argv[1])(Path(sys.argv[2])) as partial:
    (partial / "weights.bin" if partial.is_dir() else partial).write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writing(kind: str, output: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, kind, str(output)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    return writer


@pytest.mark.parametrize(
    ("kind", "name"), [("atomic_directory", "world.diagd"), ("atomic_file", "report.json")]
)
def test_leftovers_of_a_killed_run_go_and_those_of_a_live_one_stay(
    kind: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / name
    (tmp_path / f".{name}.weights.partial").write_bytes(b"to go on with")
    (tmp_path / f".other{name}.1.partial").write_bytes(b"of another output")
    killed, alive = start_writing(kind, output), start_writing(kind, output)
    try:
        killed.kill()
        killed.wait()
        (left,) = tmp_path.glob(f".{name}.{killed.pid}.partial*")
        (going,) = tmp_path.glob(f".{name}.{alive.pid}.partial*")
        with caplog.at_level(logging.WARNING), write(kind, output) as partial:
            assert not left.exists()
            assert going.exists()
            if kind == "atomic_file":
                partial.write_bytes(b"whole")
        assert f"removed {left}, left by a run that was killed" in caplog.text
        assert str(going) not in caplog.text
        names = {entry.name for entry in tmp_path.iterdir()}
        assert names == {name, going.name, f".{name}.weights.partial", f".other{name}.1.partial"}
    finally:
        alive.kill()
        alive.wait()


def write(kind: str, output: Path):  # type: ignore[no-untyped-def]
    return {"atomic_file": atomic_file, "atomic_directory": atomic_directory}[kind](output)


def test_what_a_killed_run_had_moved_away_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed between its two renames: the old bundle has only its other name."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    output, retired = tmp_path / "world.diagd", tmp_path / f".world.diagd.{process.pid}.retired"
    retired.mkdir()
    (retired / "manifest.json").write_text("{}")
    clear_leftovers(output)
    assert (output / "manifest.json").read_text() == "{}"
    assert f"put back {output}" in caplog.text
    retired.mkdir()
    clear_leftovers(output)
    assert [entry.name for entry in tmp_path.iterdir()] == ["world.diagd"]


def test_nothing_of_this_process_is_touched(tmp_path: Path) -> None:
    mine = tmp_path / f".a.bin.{os.getpid()}.partial.bin"
    mine.write_bytes(b"")
    clear_leftovers(tmp_path / "a.bin")
    assert mine.exists()
