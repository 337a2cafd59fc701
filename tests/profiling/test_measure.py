"""Runs of one order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.export.exporter import export, random_sources
from diagd.export.options import GraphOptions
from diagd.profiling.measure import measure, random_workload
from diagd.profiling.page import page
from diagd.profiling.profile import ProfileOptions, profile
from diagd.runtime.decoders import JacobiDecoder, ScheduledDecoder
from diagd.runtime.load import open_session
from diagd.schedule import Schedule, StreamLayout
from tests.models import small_family
from tests.oracles.models import small_model
from tests.profiling.conftest import LAYOUT
from tests.runtime.test_pixels import TOKENIZER


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
    decoder = ScheduledDecoder(Schedule.serial(LAYOUT, 1))
    run_ = measure(session, decoder, random_workload(session, 1, 1), 1, marks=True)
    import nvtx

    assert nvtx.seen == [f"step w={step.rows}" for step in run_.steps]
    assert len(nvtx.seen) == session.timing.steps
    assert nvtx.seen[1].startswith("step w=")


@pytest.mark.parametrize("window", [5, LAYOUT.cells])
def test_a_frame_is_done_when_its_last_pass_is(bundle: Bundle, window: int) -> None:
    """Jacobi fills the last cell of a frame in every pass that reaches it, mostly with a guess."""
    frames, ends = 4, list[int]()
    with open_session(bundle, cpu=CpuOptions(threads=1)) as session:
        workload = random_workload(session, 1, frames)
        session.start(workload.prompt, workload.prompt_actions, workload.text)
        for frame in session.frames(JacobiDecoder(window), workload.actions, count=frames):
            ends.append(frame.steps + (ends[-1] if ends else 0))
        run = measure(session, JacobiDecoder(window), workload, frames)
    assert max(np.diff(ends)) > 1
    assert len(run.steps) == ends[-1] and run.frames == frames
    assert run.first_steps == [0, *ends[:-1]]
    for number, end in enumerate(ends):
        last = run.steps[end - 1]
        assert last.began + last.seconds <= run.decoded[number]
        assert end == len(run.steps) or run.decoded[number] <= run.steps[end].began
        first = max(run.first_steps[number], run.chunks)  # what feeds the prompt comes ahead of its action
        assert run.taken(number) == run.steps[first].began


def test_jacobi_is_a_row_of_a_profile(bundle: Bundle) -> None:
    cpu = CpuOptions(threads=1)
    found = profile(bundle, ProfileOptions(ks=(1,), frames=2, jacobi=True, cpu=cpu)).report
    names = [run.order for run in found.runs]
    assert names == ["next token", "k=1 serial", "k=1 chained", "jacobi"]
    assert (found.runs[-1].k, found.runs[-1].frames) == (None, 2)
    assert "jacobi" in page(found)


def test_pictures_of_a_tokenizer_of_time_are_shown_with_their_frames(tmp_path: Path) -> None:
    """Not with the last frame of a clip that one call decodes: no time would lie between them."""
    family = replace(small_family(small_model(StreamLayout(2, 4), layers=1)), tokenizer=TOKENIZER)
    bundle = export(family, GraphOptions(), random_sources(family, 0), tmp_path / "a.diagd")
    measured = profile(bundle, ProfileOptions(frames=3, cpu=CpuOptions(threads=1)))
    for run in measured.report.runs:
        assert run.intervals.count == run.frames - 1
        assert run.frames_per_second > 0
    assert "frames/s" in page(measured.report)
