"""WebGPU on any GPU: tokens of the reference, keys turned where they lie, and what is said without one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diagd.engines.gpu import WebGpu, _load_provider
from diagd.errors import DependencyError, EngineError
from tests.engines.webgpu_driver import decoded
from tests.models import export_small
from tests.oracles.models import small_model
from tests.profiling.conftest import LAYOUT


def test_tokens_over_a_software_driver_are_those_of_the_reference(tmp_path: Path) -> None:
    path = export_small(small_model(LAYOUT, layers=1, context_frames=4), tmp_path / "a.diagd")
    verdict = decoded(path, "fp32", "play")
    assert verdict["engine"] == "webgpu fp32"
    assert verdict["passed"]
    assert verdict["cells"] == LAYOUT.cells
    assert verdict["error"] < 1e-4
    assert verdict["turned"] < 1e-6
    assert len(verdict["here"]) > 3  # frames, until the rotary table ended
    assert verdict["frames"] == verdict["here"]


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="no limits"):
        WebGpu().ceilings()
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_webgpu", None)
    _load_provider.cache_clear()
    with pytest.raises(DependencyError, match=r"pip install 'diagd\[webgpu\]'"):
        WebGpu().describe()
