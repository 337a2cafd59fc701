"""Checks of the machine: what is there is found, what is broken is told."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import stat
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from diagd.engines.host import memory_bytes
from diagd.profiling import doctor
from diagd.profiling.doctor import ABSENT, OK, PROBLEM, this_device


def test_installed_packages_are_found_with_their_versions() -> None:
    checks = {check.name: check for check in doctor.check_packages()}
    assert checks["numpy"].status == OK
    assert checks["numpy"].found == np.__version__
    assert {"pydantic", "rich", "onnxruntime", "torch"} <= set(checks)


def test_declared_packages_are_those_of_the_metadata() -> None:
    declared = doctor.declared_packages()
    for line in importlib.metadata.requires("diagd") or []:
        requirement = Requirement(line)
        if requirement.marker is None:
            assert declared[requirement.name] == (str(requirement.specifier), "")


@pytest.mark.parametrize(
    ("version", "least"), [("1.9", "1.10"), ("2.0.1", "2.0"), ("10.15.1", "10.15"), ("3", "3.1")]
)
def test_versions_are_compared_as_numbers(version: str, least: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", {"wanted": version}.get)
    monkeypatch.setattr(doctor, "declared_packages", lambda: {"wanted": (f">={least}", "")})
    (check,) = doctor.check_packages()
    assert (check.status == PROBLEM) == (Version(version) < Version(least))


def test_a_missing_package_and_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"numpy": (">=999", ""), "diagd-needs-this": (">=1", ""), "diagd-likes-this": (">=1", "export")}
    monkeypatch.setattr(doctor, "declared_packages", lambda: wanted)
    old, missing, extra = doctor.check_packages()
    assert (old.status, missing.status, extra.status) == (PROBLEM, PROBLEM, ABSENT)
    assert "999" in old.found
    assert extra.fix == "pip install 'diagd[export]'"


def test_the_gpu_build_of_onnxruntime_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime-gpu": "1.24.0"}
    monkeypatch.setattr(doctor, "installed", versions.get)
    monkeypatch.setattr(doctor, "declared_packages", lambda: {"onnxruntime": (">=1.20", "")})
    assert doctor.check_packages() == [doctor.Check("onnxruntime", OK, "1.24.0")]


def test_the_processor() -> None:
    assert f"{len(os.sched_getaffinity(0))} cores" in doctor.check_processor().found
    assert platform.python_version() in doctor.check_python().found


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sampler_that_was_compiled_or_not(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "host_build", lambda: object() if compiled else None)
    check = doctor.check_sampler()
    assert (check.status, bool(check.fix)) == (OK if compiled else ABSENT, not compiled)


def test_a_driver_that_answers_and_one_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_gpu().status in (ABSENT, PROBLEM)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA Test, 24576 MiB, 570.1'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert doctor.check_gpu() == doctor.Check("GPU", OK, "NVIDIA Test, 24576 MiB, 570.1")
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert doctor.check_gpu().status in (ABSENT, PROBLEM)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path / "new" / "cache"))
    assert doctor.check_disk().status == OK
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e30)
    assert doctor.check_disk().status == PROBLEM


def test_a_cuda_provider_that_another_package_covers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_provider() == []
    record = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (check,) = doctor.check_provider()
    assert check.status == PROBLEM
    assert "both installed, in one folder" in check.found
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in check.fix


def test_this_machine_is_a_device() -> None:
    assert 0 < memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = this_device(1)
    assert device.usable < device.memory == memory_bytes()
