"""What the machine says of itself, against other ways to ask it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from diagd.engines import host
from diagd.errors import EngineError, UsageError


def test_cores_where_the_system_tells_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "process_cpu_count", raising=False)  # of Python 3.13, which asks it
    assert host.cores() == os.cpu_count()


def test_the_processor_is_that_of_the_system() -> None:
    text = Path("/proc/cpuinfo").read_text()
    assert all(f" {flag}" in text for flag in host.instruction_sets())
    assert host.processor_name() in text or host.processor_name() == platform.machine()
    assert host.processor_features().startswith(platform.machine())


def test_without_a_list_of_the_processor_numpy_tells_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = host.instruction_sets()
    monkeypatch.setattr(host, "_processor", dict)
    known = host.instruction_sets()
    named = {"avx2", "avx512f", "avx512_vnni"}
    assert known & named == told & named
    assert platform.machine() != "x86_64" or "avx" in known


def test_available_memory_is_some_of_the_machines() -> None:
    available = host.available_bytes()
    assert available is not None
    assert 0 < available <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_what_needs_too_much_memory_is_refused_with_the_figures() -> None:
    host.check_memory(2e9, None, "work", "do less")
    host.check_memory(2e9, 3 * 10**9, "work", "do less")
    message = r"work takes about 2\.0 GB of memory, 1\.5 GB are free; do less"
    with pytest.raises(UsageError, match=message):
        host.check_memory(2e9, 1_500_000_000, "work", "do less")
    with pytest.raises(EngineError, match=message):
        host.check_memory(2e9, 1_500_000_000, "work", "do less", EngineError)
