"""Calls that only some systems have are not missed on the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diagd.engines.host import UNKNOWN_MEMORY, cores, cpu_quota, memory_bytes, memory_limit, peak_memory

BARE = """
import os, signal, sys
names = ("sched_getaffinity", "sched_setaffinity", "sysconf", "getuid", "geteuid", "process_cpu_count")
for module, name in [*((os, name) for name in names), (signal, "SIGHUP")]:
    if hasattr(module, name):
        delattr(module, name)
sys.modules |= dict.fromkeys(("resource", "fcntl", "pwd", "grp"))
from diagd.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""diagd where Linux's own calls and modules are absent."""


def test_this_system_tells() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert memory_bytes() > 1 << 28
    assert peak_memory() > 1 << 20


@pytest.mark.parametrize(
    ("group", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),  # in a container
        ("0::/system.slice/diagd.service", {"system.slice/diagd.service/cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 0.5),
        ("0::/a/b", {"cpu.max": "max 100000"}, None),
        (
            "4:cpu,cpuacct:/docker/1\n1:memory:/\n0::/",  # as it is named outside
            {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpuset:/\n2:cpuacct:/", {}, None),
    ],
)
def test_the_time_of_a_control_group_is_known(
    tmp_path: Path, group: str, files: dict[str, str], quota: float | None
) -> None:
    found = cpu_quota(groups(tmp_path, group, files))
    assert found == quota if quota else found > 1e6
    assert cpu_quota((tmp_path, tmp_path / "none")) > 1e6


@pytest.mark.parametrize(
    ("group", "base", "limit", "free"),
    [
        ("0::/", "", 2 << 30, 1 << 30),
        ("0::/user.slice/run-1.scope", "user.slice/run-1.scope/", 2 << 30, 1 << 30),
        ("0::/a/b", "a/", 2 << 30, 1 << 30),
        ("4:memory:/docker/1\n1:cpu:/\n0::/", "memory/", 2 << 30, 1 << 30),
        ("4:memory:/a", "memory/a/", 2 << 30, 1 << 30),
        ("0::/a", "b/", 1 << 62, 1 << 62),
        ("3:cpu:/", "", 1 << 62, 1 << 62),
    ],
)
def test_the_memory_of_a_control_group_is_known(
    tmp_path: Path, group: str, base: str, limit: int, free: int
) -> None:
    first = "memory:" in group
    names = ("limit_in_bytes", "usage_in_bytes") if first else ("max", "current")
    cached = f"anon 1\n{'total_' * first}inactive_file {1 << 29}\nfile 7"
    told = (str(2 << 30), str(3 << 29), cached)
    files = {f"{base}memory.{name}": text for name, text in zip((*names, "stat"), told, strict=True)}
    places = groups(tmp_path, group, files)
    assert memory_limit(places) == (limit, free)
    (tmp_path / f"{base}memory.{names[0]}").write_text(f"{9 << 60 if first else 'max'}\n")
    assert memory_limit(places)[1] >= 1 << 62


def groups(root: Path, group: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Control groups as Linux tells of them, and which a process is in."""
    for name, told in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{told}\n")
    (root / "own").write_text(f"{group}\n")
    return root, root / "own"


def test_without_the_calls_of_one_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sched_getaffinity", "process_cpu_count", "sysconf"):
        monkeypatch.delattr(os, name, raising=False)
    assert cores() == os.cpu_count()
    assert memory_bytes() <= UNKNOWN_MEMORY


@pytest.mark.parametrize("verb", ["doctor", "models", "--version"])
def test_verbs_run_without_the_calls_of_linux(verb: str) -> None:
    done = subprocess.run([sys.executable, "-c", BARE, verb], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
