"""What this machine has, and whether it will do."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from diagd.bundle import Bundle, cache
from diagd.engines.backend import CPU, find
from diagd.engines.devices.kernels import host_build
from diagd.engines.host import cores, installed, instruction_sets, memory_bytes
from diagd.engines.onnxruntime_session import INSTALL, provider_problem
from diagd.engines.tensorrt import RUNTIMES
from diagd.errors import BundleError, command_line, pip_line
from diagd.profiling.cost import GB, THIS, Device
from diagd.runtime.load import measured

OK: Final = "ok"
PROBLEM: Final = "problem"
ABSENT: Final = "absent"

EXTRAS: Final = ("", "export", "report", "openvino", "play", "gym", "cluster", "text")
"""Whose packages are looked at; the first are required."""

LEAST_MEMORY: Final = 2 * GB
LEAST_DISK: Final = 2 * GB

INTEGER_UNITS: Final = {
    "amx_int8": "AMX int8",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "i8mm": "I8MM",
    "asimddp": "dot product",
}
"""CPU flags that decide how fast int8 products are, best first."""

SUBSTITUTES: Final = {"onnxruntime": "onnxruntime-gpu"}
"""Packages that are installed instead of a declared one: both bring the same module."""


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, ``ok``, ``problem`` or ``absent``, what was found, how to fix it."""

    name: str
    status: str
    found: str
    fix: str = ""

    @classmethod
    def of(cls, name: str, is_fine: bool, found: str, fix: str) -> Check:
        """What is fine, or a problem."""
        return cls(name, OK, found) if is_fine else cls(name, PROBLEM, found, fix)


def check_machine() -> list[Check]:
    """Python, packages, processor, memory, disk, temporary files and GPU."""
    return [
        check_python(),
        *check_packages(),
        check_processor(),
        check_sampler(),
        check_memory(),
        check_disk(),
        check_temporary(),
        check_gpu(),
        *check_provider(),
        *check_tensorrt(),
    ]


def check_python() -> Check:
    """Version of the interpreter."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("Python", OK, found)


def check_packages() -> list[Check]:
    """Packages that diagd declares: missing required ones are a problem, missing extras only absent."""
    checks = []
    for name, (specifier, extra) in declared_packages().items():
        version = installed(name) or installed(SUBSTITUTES.get(name, name))
        fix = pip_line(extra) if extra else command_line("pip", "install", f"{name}{specifier}")
        if version is None:
            checks.append(Check(name, ABSENT if extra else PROBLEM, "not installed", fix))
        else:
            fits = SpecifierSet(specifier).contains(version, prereleases=True)
            checks.append(Check.of(name, fits, version if fits else f"{version}, {specifier} is needed", fix))
    return checks


def declared_packages() -> dict[str, tuple[str, str]]:
    """Version specifier and extra ('' for required) of the packages of ``EXTRAS``."""
    try:
        lines = importlib.metadata.requires("diagd") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    packages: dict[str, tuple[str, str]] = {}
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        extras = (extra for extra in EXTRAS if marker is None or marker.evaluate({"extra": extra}))
        if requirement.name != "diagd" and (extra := next(extras, None)) is not None:
            packages.setdefault(requirement.name, (str(requirement.specifier), extra))
    return packages


def check_processor() -> Check:
    """Cores, and the fastest unit for int8 products."""
    flags = instruction_sets()
    units = [title for flag, title in INTEGER_UNITS.items() if flag in flags]
    found = f"{cores()} cores, {', '.join(units) or 'no integer units known'}"
    is_fast = bool(flags & {"avx2", "asimddp", "i8mm"})
    return Check.of("processor", is_fast, found, "int8 will be slower than fp32 here: export fp32")


def check_sampler() -> Check:
    """Whether the host's sampler, and a GPU's attention, were compiled when diagd was installed."""
    if host_build() is not None:
        return Check("sampler", OK, "compiled")
    found = (
        "not compiled, or on another system: NumPy draws the same ids in up to ten times the time, and steps "
        "on a GPU have ONNX Runtime's attention"
    )
    return Check("sampler", ABSENT, found, "install a C++ compiler, then reinstall diagd from its source")


def check_memory() -> Check:
    """Memory this process may use."""
    total = memory_bytes()
    fix = "take a machine or container with 2 GB or more"
    return Check.of("memory", total >= LEAST_MEMORY, f"{total / GB:.1f} GB", fix)


def this_device(threads: int = 0) -> Device:
    """The processor of this machine as a device, measured."""
    ceilings = find(CPU).ceilings(threads)
    return Device(
        THIS,
        f"this machine's CPU, {ceilings.threads} threads",
        float(memory_bytes()),
        ceilings.bandwidth,
        ceilings.peak,
        1e9,
        "measured now: copy and sum, and product of single-precision matrices",
    )


def check_disk() -> Check:
    """Room for packed weights and compiled engines, and the right to write them."""
    fix = "set DIAGD_CACHE to a directory of yours"
    place = cache.cache_directory()
    if place is None:
        return Check("cache", ABSENT, "no place for one: HOME and XDG_CACHE_HOME are not set", fix)
    parent = next(path for path in (place, *place.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        return Check("cache", PROBLEM, f"{place} cannot be written", fix)
    free, held = shutil.disk_usage(parent).free, cache.usage()
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(held.entries.items())) or "empty"
    found = (
        f"{place}: {kinds}; {held.total_bytes / GB:.2f} of at most {cache.limit_bytes(place) / GB:.1f} GB, "
        f"{free / GB:.1f} GB free"
    )
    return Check.of("cache", free >= LEAST_DISK, found, "free some space, or set DIAGD_CACHE to another disk")


def check_temporary() -> Check:
    """Where files go that are gone again when a verb has ended."""
    try:
        return Check("temporary files", OK, f"in {tempfile.gettempdir()}")
    except OSError:
        fix = "set TMPDIR to a folder that can be written; in a container: --tmpfs /tmp"
        return Check("temporary files", PROBLEM, "there is no place for them", fix)


def check_gpu() -> Check:
    """NVIDIA driver and devices, as ``nvidia-smi`` tells them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        with suppress(OSError):
            ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
            fix = "check the driver: nvidia-smi should list the device"
            return Check("GPU", PROBLEM, "the driver's library without a working nvidia-smi", fix)
        return Check(
            "GPU", ABSENT, "no NVIDIA driver", "bundles run on the CPU; for a GPU install its driver"
        )
    return Check("GPU", OK, "; ".join(answer.strip().splitlines()))


def check_provider() -> list[Check]:
    """ONNX Runtime's CUDA provider, where its package is installed."""
    version = installed("onnxruntime-gpu")
    if version is None:
        return []
    import onnxruntime

    problem = provider_problem(onnxruntime.__version__, onnxruntime.get_available_providers())
    return [Check.of("CUDA provider", not problem, problem or f"ONNX Runtime {version}", INSTALL)]


def check_tensorrt() -> list[Check]:
    """Flavours of TensorRT and what they can do in a step graph."""
    checks = []
    for package, extra in RUNTIMES.items():
        version = installed(package) or installed(package.replace("_", "-"))
        if version is None:
            checks.append(Check(package, ABSENT, "not installed", f"on a GPU: {pip_line(extra)}"))
            continue
        modern = extra == "rtx" or Version(version) >= Version("10.15")
        form = "modern form (in-place K/V)" if modern else "portable form only: K/V update needs 10.15"
        checks.append(Check(package, OK, f"{version}, {form}"))
    return checks


def check_bundle(path: Path) -> list[Check]:
    """A bundle's files against its manifest, and its compiled engines."""
    try:
        bundle = Bundle.open(path)
    except BundleError as error:
        return [Check(str(path), PROBLEM, str(error), "export the bundle again or copy it afresh")]
    name, count = bundle.manifest.name, len(bundle.manifest.files)
    found = f"{name}, {count} files, {bundle.size / 1e6:,.1f} MB, digests agree"
    engines = ", ".join(sorted(entry.name for entry in (path / "engines").glob("*") if entry.is_dir()))
    forms = ", ".join(sorted({graph.form.value for graph in bundle.manifest.graphs}))
    compiled = Check("engines", OK, engines or f"none compiled; {forms} graphs run on ONNX Runtime")
    return [Check(str(path), OK, found), compiled, check_fastest(bundle)]


def check_fastest(bundle: Bundle) -> Check:
    """The fastest way to decode a bundle here, as it was last measured."""
    found = measured(bundle)
    best = found.fastest() if found else None
    if found is None or best is None:
        line = command_line("diagd", "profile", str(bundle.path), "--backends")
        return Check("fastest", ABSENT, "not measured on this machine", line)
    rate = (
        f"{1 / best.seconds:.4g} frames/s with {best.threads} threads, {found.order}, measured {found.date}"
    )
    return Check("fastest", OK, f"{best}: {rate}", best.settings)
