"""Which schedules a calibration decodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import AbsoluteContext
from diagd.calibration.trajectory import trajectories
from diagd.errors import UsageError
from diagd.export.options import GraphOptions
from diagd.schedule import Schedule
from tests.calibration.bundles import ANYTHING, LAYOUT, quantise
from tests.models import export_small
from tests.oracles.models import small_model

CHAINED = "k=1 chained"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs that take a serial step, but not one of chained frames."""
    width = Schedule.chained(LAYOUT, 1).widest_step - 1
    model = small_model(LAYOUT, layers=1, context_frames=6)
    path = tmp_path_factory.mktemp("narrow") / "small.diagd"
    return export_small(model, path, GraphOptions((Form.MODERN,), "fp16", widths=(width,)))


def test_schedules_with_wider_steps_are_left_out(narrow: Path) -> None:
    report = quantise(narrow, "int8", budget=ANYTHING)
    names = [trajectory.name for trajectory in report.trajectories]
    assert "k=1" in names
    assert CHAINED not in names
    manifest = Bundle.open(narrow).manifest
    assert CHAINED in [trajectory.name for trajectory in trajectories(manifest, 4, 64)]


def test_the_window_slides_along_a_schedule_that_fits(narrow: Path) -> None:
    manifest = Bundle.open(narrow).manifest
    *_, sliding = trajectories(manifest, 4, 64, max_width=3)
    assert sliding.schedule.k > 1
    assert sliding.schedule.widest_step <= 3


def test_graphs_too_narrow_for_every_schedule_are_refused_at_once(narrow: Path) -> None:
    manifest = Bundle.open(narrow).manifest
    with pytest.raises(UsageError, match="steps feed 2 tokens or more, the graphs of small take 1; export"):
        trajectories(manifest, 4, 64, max_width=1)


def test_no_window_slides_under_frames_that_overlap(narrow: Path) -> None:
    """As Cosmos' models of a text have it: positions of the window, and chained frames by default."""
    told = {"context": AbsoluteContext(frames=6), "order": CHAINED}
    manifest = Bundle.open(narrow).manifest.model_copy(update=told)
    chained, *_, slid = trajectories(manifest, 4, 64)
    assert chained.schedule == manifest.schedule and chained.schedule.d < chained.schedule.steps_per_frame
    assert chained.prompt + chained.frames <= 4 < slid.prompt + slid.frames
    assert slid.schedule.d >= slid.schedule.steps_per_frame
