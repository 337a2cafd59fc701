"""Runs of one order."""

from __future__ import annotations

from pathlib import Path

import pytest

from diagd.bundle import Bundle
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.profiling.measure import measure, random_workload
from diagd.runtime.load import open_session
from diagd.schedule import Schedule
from tests.profiling.conftest import LAYOUT


def test_nvtx_marks_steps_where_it_is_installed(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name stands in for nvtx, which needs no GPU to be imported but is not required."""
    package = tmp_path / "nvtx.py"
    package.write_text(
        "from contextlib import contextmanager\nseen = []\n\n@contextmanager\ndef annotate(name):\n"
        "    seen.append(name)\n    yield\n"
    )
    session = open_session(bundle, cpu=CpuOptions(threads=1))
    monkeypatch.syspath_prepend(str(tmp_path))
    run_ = measure(session, Schedule.serial(LAYOUT, 1), random_workload(session, 1, 1), 1, marks=True)
    import nvtx

    assert nvtx.seen == [f"step w={step.rows}" for step in run_.steps]
    assert len(nvtx.seen) == session.timing.steps
    assert nvtx.seen[1].startswith("step w=")
