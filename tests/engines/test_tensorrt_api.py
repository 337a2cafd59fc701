"""Every name of TensorRT that diagd uses exists in the bindings of the versions it supports."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from diagd.engines.tensorrt import capabilities
from tests.engines.tensorrt_bindings import (
    DATA,
    GUARDED,
    METHODS,
    MODERN_METHODS,
    VERSIONS,
    NoWheelError,
    names_needed,
    names_offered,
    names_used,
)

OFFERED: dict[str, list[str]] = json.loads(DATA.read_text())


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_exists(version: str) -> None:
    """As recorded from the wheels; a name that is missing from the record was never looked up."""
    modern = "modern" in VERSIONS[version]
    methods = {**METHODS, **(MODERN_METHODS if modern else {})}
    wanted = {f"{kind}.{name}" for kind, names in methods.items() for name in names.split()}
    used = {
        name
        for name in names_used()
        if not name.startswith("ComputeCapability")
        and (modern or not any(name.startswith(guarded) for guarded in GUARDED))
    }
    assert {"Builder", "OnnxParser", "Runtime", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"} <= used
    missing = (wanted | used) - set(OFFERED[version])
    assert not missing, "not in these bindings, or new: run python -m tests.engines.tensorrt_bindings"


@pytest.mark.parametrize("version", VERSIONS)
def test_capabilities_are_told_from_names(version: str) -> None:
    expected = VERSIONS[version]
    offered = capabilities(as_module(OFFERED[version]))
    assert offered.form.value == ("modern" if "modern" in expected else "portable")
    assert offered.cross_targets == ()
    found = (offered.reports_aliases, offered.live_lengths, offered.timing_cache)
    assert found == tuple(name in expected for name in ("aliases", "lengths", "timing"))


def as_module(names: list[str]) -> ModuleType:
    """Something that has these dotted names and no others."""
    module = ModuleType("tensorrt")
    vars(module)["__version__"] = "0"
    for name in names:
        value: object = module
        for part in name.split("."):
            if not hasattr(value, part):
                setattr(value, part, SimpleNamespace())
            value = getattr(value, part)
    return module


@pytest.mark.parametrize("version", VERSIONS)
def test_the_record_is_what_the_wheels_offer(version: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("g++ is needed for the libraries that stand in for TensorRT's")
    try:
        offered = names_offered(version, tmp_path)
    except NoWheelError as error:
        pytest.skip(str(error))
    assert offered == OFFERED[version]
    assert names_needed() >= set(offered)
