"""The machine that engines run on: cores, processor, memory and packages."""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Final

import numpy as np

from diagd.errors import DiagdError, UsageError

UNKNOWN_MEMORY = 8 << 30
"""Bytes taken for granted where the system does not say."""


def cores() -> int:
    """Cores this process may use: those it may run on, or as many as its control group has the time of."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return min(len(os.sched_getaffinity(0)), max(1, math.ceil(cpu_quota())))
    return getattr(os, "process_cpu_count", os.cpu_count)() or 1


GROUPS: Final = (Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
"""Where Linux tells of control groups, and which this process is in."""


def _groups(kind: str, places: tuple[Path, Path]) -> Iterator[tuple[Path, bool]]:
    """Folders of the groups that limit this process, inner ones first; True: of the first version."""
    root, own = places
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    for _, kinds, group in (line.split(":", 2) for line in lines):
        if not kinds or kind in kinds.split(","):
            base = root / kind if kinds else root
            inner = base / group.lstrip("/")  # in a container the group may be that of outside
            folders = (folder for folder in (inner, *inner.parents) if folder.is_relative_to(base))
            yield from ((folder, bool(kinds)) for folder in folders)


def _told(folder: Path, *names: str) -> list[str]:
    """Words of files of a group; none where they cannot all be read."""
    try:
        return " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
    except OSError:
        return []


def cpu_quota(places: tuple[Path, Path] = GROUPS) -> float:
    """Cores whose time control groups leave this process, by ``docker --cpus`` or ``CPUQuota=``, or many."""
    quota = 1e9
    for folder, first in _groups("cpu", places):
        told = _told(folder, *(("cpu.cfs_quota_us", "cpu.cfs_period_us") if first else ("cpu.max",)))
        if told and told[0].isdigit():  # else "max" or -1
            quota = min(quota, int(told[0]) / int(told[1]))
    return quota


def memory_limit(places: tuple[Path, Path] = GROUPS) -> tuple[int, int]:
    """Bytes that control groups let this process have, by ``docker -m`` or ``MemoryMax=``, and those free.

    Many where there is no limit. What is kept of files that were read is free: the system takes it back.
    """
    limit = free = 1 << 62
    for folder, first in _groups("memory", places):
        names = ("limit_in_bytes", "usage_in_bytes", "stat") if first else ("max", "current", "stat")
        told = _told(folder, *(f"memory.{name}" for name in names))
        if told and told[0].isdigit():  # else "max"
            most, used = int(told[0]), int(told[1])
            kept = dict(zip(told[2::2], told[3::2], strict=False))
            unused = int(kept.get("total_inactive_file" if first else "inactive_file", 0))
            limit, free = min(limit, most), min(free, max(0, most - used + unused))
    return limit, free


@cache
def _processor() -> dict[str, str]:
    """Fields of the first processor of /proc/cpuinfo; none where there is no such file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if info.is_file() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def processor_name() -> str:
    """What the processor is called."""
    return _processor().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> frozenset[str]:
    """Instruction sets of the processor by the names of /proc/cpuinfo; without one, those NumPy knows."""
    found = _processor()
    told = found.get("flags") or found.get("Features")
    return frozenset(told.split()) if told else _known_to_numpy()


def _known_to_numpy() -> frozenset[str]:
    core = import_module("numpy._core" if np.__version__ >= "2" else "numpy.core")
    known: dict[str, bool] = core._multiarray_umath.__cpu_features__
    names = {"AVX512VNNI": "avx512_vnni"}
    return frozenset(names.get(name, name.lower()) for name, here in known.items() if here)


def sums_eight_bits() -> bool:
    """Whether libraries sum products of eight bits in 32; on x86 without VNNI in 16, which overflow."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return not x86 or bool({"avx512_vnni", "avx_vnni", "amx_int8"} & instruction_sets())


def processor_features() -> str:
    """What decides how weights are packed: architecture and instruction sets."""
    return f"{platform.machine()} {' '.join(sorted(instruction_sets())) or platform.processor()}"


def installed(package: str) -> str | None:
    """Version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or the limit of its control group."""
    return min(_memory()[0] or UNKNOWN_MEMORY, memory_limit()[0])


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    free = _memory()[1]
    return min(free, memory_limit()[1]) if free else None


if sys.platform == "win32":

    def _memory() -> tuple[int, int]:
        """Bytes of the machine, and those free: ``ullTotalPhys`` and ``ullAvailPhys``."""
        status = (ctypes.c_uint64 * 8)()
        ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[1], status[2]

    def peak_memory() -> int:
        """Most bytes this process has had in memory: ``PeakWorkingSetSize``."""
        counters = (ctypes.c_uint64 * 9)()
        ctypes.cast(counters, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(counters)
        kernel = ctypes.windll.kernel32
        kernel.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), counters, ctypes.sizeof(counters))
        return counters[1]

else:

    def _memory() -> tuple[int, int]:
        """Bytes of the machine, and those that can be had without swapping; 0: the system does not say."""
        meminfo = Path("/proc/meminfo")
        lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.is_file() else []
        told = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        return _configured("SC_PHYS_PAGES"), told[0] if told else _configured("SC_AVPHYS_PAGES")

    def _configured(pages: str) -> int:
        """Bytes of a number of pages that ``sysconf`` tells, or 0."""
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)
        except (AttributeError, ValueError, OSError):
            return 0

    def peak_memory() -> int:
        """Most bytes this process has had in memory."""
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def exact_waits() -> Iterator[None]:
    """Have waits end when they are over: those of Windows last up to 16 ms longer, unless it is asked for."""
    if sys.platform == "win32":
        ctypes.windll.winmm.timeBeginPeriod(1)
    try:
        yield
    finally:
        if sys.platform == "win32":
            ctypes.windll.winmm.timeEndPeriod(1)


def check_memory(
    needed: float, available: int | None, action: str, fix: str, error: type[DiagdError] = UsageError
) -> None:
    """Refuse (DiagdError) what would be killed half way; bytes, None: not known.

    ``action`` completes "... takes about"; ``fix`` says how to need less, or to have more.
    """
    if available is not None and needed > available:
        raise error(
            f"{action} takes about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free; {fix}"
        )
