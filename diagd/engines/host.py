"""The machine that engines run on: cores, processor, memory and packages."""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

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
    """Instruction sets of the processor by the names of /proc/cpuinfo; empty where there is none."""
    found = _processor()
    return frozenset((found.get("flags") or found.get("Features") or "").split())


def sums_eight_bits() -> bool:
    """Whether libraries sum products of eight bits in 32; on x86 without VNNI they do in 16, which overflow.

    True where the system does not say.
    """
    found = instruction_sets()
    x86 = platform.machine() in ("x86_64", "AMD64") and bool(found)
    return not x86 or bool({"avx512_vnni", "avx_vnni", "amx_int8"} & found)


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
    total = _configured("SC_PHYS_PAGES") or _windows_memory() or UNKNOWN_MEMORY
    return min(total, memory_limit()[0])


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, memory_limit()[1])
    return _configured("SC_AVPHYS_PAGES")


def peak_memory() -> int:
    """Most bytes this process has had in memory; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _configured(pages: str) -> int | None:
    """Bytes of a number of pages that ``sysconf`` tells, where there is one."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)
    except (AttributeError, ValueError, OSError):
        return None


def _windows_memory() -> int | None:
    """``ullTotalPhys`` of ``GlobalMemoryStatusEx``."""
    libraries = getattr(ctypes, "windll", None)
    if libraries is None:
        return None
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    return int(status[1]) if libraries.kernel32.GlobalMemoryStatusEx(status) else None


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
