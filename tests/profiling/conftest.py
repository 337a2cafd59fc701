"""One small bundle, profiled once for all tests of reports."""

from __future__ import annotations

import time

import pytest

from diagd.bundle import Bundle
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.profiling.profile import Profile, ProfileOptions, profile
from diagd.schedule import StreamLayout
from tests.models import export_small
from tests.oracles.models import small_model

LAYOUT = StreamLayout(4, 6, after=1)


class Clock:
    """What this thread computes, however long others have its core, and what is added to it, in seconds."""

    added = 0.0

    def __call__(self) -> float:
        return time.thread_time() + self.added


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In place of the one that is measured by."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = small_model(LAYOUT, context_frames=4)
    return Bundle.open(export_small(model, tmp_path_factory.mktemp("profiled") / "small.diagd"))


@pytest.fixture(scope="session")
def profiled(bundle: Bundle) -> Profile:
    return profile(bundle, ProfileOptions(frames=6, fps=5.0, cpu=CpuOptions(threads=1)))
