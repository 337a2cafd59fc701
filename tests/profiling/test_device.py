"""Profiles of an engine on a device: over memory of the host, and on a GPU where there is one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import AbsoluteContext
from diagd.engines.backend import find
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import DiagdError, UsageError
from diagd.export.options import GraphOptions
from diagd.profiling.measure import measure, random_workload
from diagd.profiling.page import page
from diagd.profiling.plan import orders_of
from diagd.profiling.profile import Profile, ProfileOptions, profile
from diagd.profiling.report import compare
from diagd.profiling.verify import of_backend, open_reference, verify
from diagd.runtime.decoders import ScheduledDecoder
from diagd.runtime.load import open_session
from diagd.schedule import Schedule
from tests.engines.host_device import host_kernels
from tests.models import export_small
from tests.oracles.models import small_model
from tests.profiling.conftest import LAYOUT, Clock
from tests.profiling.workshop import Workshop

WIDTHS = (1, 4, 16)
needs_kernels = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
CPU = CpuOptions(threads=1, prepack=False)
OPTIONS = ProfileOptions(ks=(1,), frames=4, fps=5.0, cpu=CPU)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = GraphOptions((Form.MODERN,), widths=WIDTHS)
    path = tmp_path_factory.mktemp("device") / "modern.diagd"
    return Bundle.open(export_small(small_model(LAYOUT, layers=1, context_frames=4), path, options))


@pytest.fixture
def workshop(clock: Clock) -> Workshop:
    return Workshop(host_kernels())


@needs_kernels
def test_a_profile_of_a_device(bundle: Bundle, workshop: Workshop) -> None:
    measured = profile(bundle, OPTIONS, backend=workshop)
    check_profile(measured)
    assert measured.report.machine.device == "host memory"
    assert "host memory" in page(measured.report)
    assert all(device.log[-1] == ("close",) for device in workshop.devices)
    assert compare(measured.report, measured.report).regressions == []


def check_profile(measured: Profile) -> None:
    """Stages add up, and every step of the schedules is there, once, in order."""
    report = measured.report
    walls = sum(run.wall for run in report.runs)
    totals = sum(stage.seconds.total for run in report.runs for stage in run.stages)
    assert totals == pytest.approx(walls, rel=0.03)
    assert [run.order for run in report.runs] == ["next token", "k=1 serial", "k=1 chained"]
    for run, found in zip(measured.runs, report.runs, strict=True):
        assert run.schedule is not None
        assert found.passes == run.schedule.total_steps(run.frames) + run.chunks
        assert sum(width.steps for width in found.widths) == found.passes - run.chunks - 1
        ends = [step.began + step.engine for step in run.steps]
        begins = [step.began for step in run.steps]
        assert np.all(np.array(begins[1:]) >= np.array(ends[:-1]) - 1e-4)
        assert run.began <= begins[0]
        assert ends[-1] <= run.ended + 1e-4
        assert all(step.engine > 0 and step.sampling == 0 for step in run.steps)
    assert report.machine.copied > 0 == report.machine.read
    assert report.machine.peak > 0
    assert report.device_memory > 0
    assert report.model.engine == "modern"


@needs_kernels
def test_the_time_of_a_step_is_the_device_s(bundle: Bundle, workshop: Workshop, clock: Clock) -> None:
    """A program that takes longer is found in the engine's time of its own step and in no other."""
    session = open_session(bundle, cpu=CPU, backend=workshop)
    workload, schedule = random_workload(session, 2, 3), Schedule.serial(LAYOUT, 1)
    left = [20]

    def wait() -> None:
        if left[0] == 0:
            clock.added += 0.201
        left[0] -= 1

    workshop.before_step = wait
    run = measure(session, ScheduledDecoder(schedule), workload, 3)
    times = [step.engine for step in run.steps]
    assert np.argmax(times) == 20
    assert times[20] > 0.2 > sorted(times)[-2]
    assert max(step.host for step in run.steps) < 0.2


@needs_kernels
def test_feeding_a_context_again_is_a_stage_of_its_own(bundle: Bundle, workshop: Workshop) -> None:
    context = AbsoluteContext(frames=4, roll=2)
    slides = replace(bundle, manifest=bundle.manifest.model_copy(update={"context": context}))
    session, frames = open_session(slides, cpu=CPU, backend=workshop), 6
    schedule = Schedule.serial(LAYOUT, 2)
    run = measure(session, ScheduledDecoder(schedule), random_workload(session, 2, frames), frames)
    assert len(run.steps) - run.chunks == schedule.total_steps(frames)
    seconds = run.timeline.seconds()
    assert len(seconds["context refill"]) == 2
    assert sum(map(sum, seconds.values())) == pytest.approx(run.ended - run.began, rel=0.05)


@needs_kernels
def test_cells_and_tensors_of_a_device_are_verified(
    bundle: Bundle, workshop: Workshop, tmp_path: Path
) -> None:
    """Against the FP32 prefix graph of the same weights; every step gives its logits."""
    plain = Bundle.open(export_small(small_model(LAYOUT, layers=1, context_frames=4), tmp_path / "p.diagd"))
    (candidate,) = of_backend(bundle, workshop, 3, CPU)
    with candidate.session, open_reference(plain, candidate.session) as reference:
        workload = random_workload(candidate.session, 1, 5)
        for order in orders_of(bundle.manifest.layout, (1,)):
            verdict = verify(
                candidate.session, reference, candidate.name, candidate.precision, order, workload, 5
            )
            assert verdict.passed, verdict
            assert (verdict.engine, verdict.cells) == ("host fp32", 5 * LAYOUT.cells)
            assert verdict.error < 1e-4
        assert [found.tensor for found in candidate.tensors() if found.passed] == [
            *("logits", "present_key_0", "present_value_0")
        ]
    assert workshop.devices[-1].log[-1] == ("close",)
    with pytest.raises(UsageError, match="--form modern or portable"):
        next(of_backend(plain, workshop, 3, CPU))


@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_a_profile_on_a_gpu(bundle: Bundle, backend: str) -> None:
    try:
        find(backend).describe()
    except DiagdError as error:
        pytest.skip("skipped: no CUDA device" if "no CUDA device" in str(error) else str(error))
    try:
        measured = profile(bundle, replace(OPTIONS, backend=backend))
    except DiagdError as error:
        pytest.skip(str(error))
    check_profile(measured)


def test_backends_that_are_not_there(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="did you mean 'cuda'"):
        profile(bundle, replace(OPTIONS, backend="cude"))
    with pytest.raises(UsageError, match="form on the CPU"):
        profile(bundle, replace(OPTIONS, backend="cuda", engine="prefix"))
