"""Writers of one place take turns, and those who wait are told for whom."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diagd.bundle.lock import turn

HOLDER = """
import sys, time
from pathlib import Path
from diagd.bundle.lock import turn
with turn(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.readline()
"""

COUNTER = """
import sys
from pathlib import Path
from diagd.bundle.lock import turn
file = Path(sys.argv[1])
for _ in range(20):
    with turn(file):
        file.write_text(str(int(file.read_text()) + 1))
"""


def hold(path: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "mine\n"
    return holder


def test_who_waits_is_told_for_whom(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.diagd"
    holder = hold(path)
    waits: list[float] = []

    def release(seconds: float) -> None:
        waits.append(seconds)
        holder.communicate("done\n")

    monkeypatch.setattr(time, "sleep", release)
    with caplog.at_level(logging.WARNING), turn(path):
        pass
    assert waits
    assert f"process {holder.pid} on" in caplog.text
    assert str(path) in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    holder = hold(tmp_path / "a.diagd")
    holder.kill()
    holder.wait()
    with turn(tmp_path / "a.diagd"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_turn_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "count"
    file.write_text("0")
    counters = [subprocess.Popen([sys.executable, "-c", COUNTER, str(file)]) for _ in range(3)]
    assert [counter.wait() for counter in counters] == [0, 0, 0]
    assert file.read_text() == "60"


def test_where_there_are_no_locks_the_work_goes_on(tmp_path: Path) -> None:
    (tmp_path / ".a.diagd.lock").mkdir()
    with turn(tmp_path / "a.diagd"):
        done = os.getpid()
    assert done
