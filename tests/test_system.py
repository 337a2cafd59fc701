"""Calls that only some systems have are not missed on the others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from diagd.engines.host import UNKNOWN_MEMORY, cores, memory_bytes, peak_memory

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


def test_without_the_calls_of_one_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert cores() == os.cpu_count()
    assert memory_bytes() <= UNKNOWN_MEMORY


@pytest.mark.parametrize("verb", ["doctor", "models", "--version"])
def test_verbs_run_without_the_calls_of_linux(verb: str) -> None:
    done = subprocess.run([sys.executable, "-c", BARE, verb], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
