"""The ladder: every optimisation measured against the same step without it, or why not."""

from __future__ import annotations

import io
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import benchmarks.ladder as ladder_module
from benchmarks.ladder import REPEATS, Ladder, Row, SwitchedEngine, show
from diagd.bundle import Bundle, Form
from diagd.engines.backend import StepOptions, find
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import DiagdError
from diagd.export.options import GraphOptions
from diagd.profiling.measure import random_workload
from diagd.runtime.load import open_session, step_options
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.schedule import Schedule
from tests.engines.host_device import host_kernels
from tests.models import export_small
from tests.oracles.models import small_model
from tests.profiling.conftest import LAYOUT
from tests.profiling.workshop import Workshop

CPU = CpuOptions(threads=1, prepack=False)
needs_kernels = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


@pytest.fixture
def workshop() -> Workshop:
    return Workshop(host_kernels())


def climb(bundle: Bundle) -> dict[str, Row]:
    return {rung.name: rung for rung in Ladder(bundle, None, 3, CPU, find("cpu")).rows()}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Prefix and modern graphs."""
    options = GraphOptions((Form.PREFIX, Form.MODERN), widths=(1, 4, 16))
    path = tmp_path_factory.mktemp("ladder") / "both.diagd"
    return Bundle.open(export_small(small_model(LAYOUT, layers=1, context_frames=4), path, options))


def renamed(bundle: Bundle, form: Form, precision: str) -> Bundle:
    """The bundle whose graphs of one form say that they are of another precision."""
    graphs = tuple(
        graph.model_copy(update={"precision": precision}) if graph.form is form else graph
        for graph in bundle.manifest.graphs
    )
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"graphs": graphs}))


def check_measured(rung: Row, *held: str) -> None:
    assert rung.seconds is not None
    assert rung.before is not None
    assert rung.gain == pytest.approx(rung.before / rung.seconds)
    for words in held:
        assert words in rung.held


def test_every_rung_is_measured_or_says_why_not(both: Bundle) -> None:
    rungs = climb(both)
    assert list(rungs) == [
        *("precision", "none", "live-prefix attention", "in-place K/V", "both"),
        "CUDA graph",
    ]
    assert rungs["none"].gain == 1.0
    for name in ("none", "live-prefix attention", "in-place K/V", "both"):
        check_measured(rungs[name], "prefix form, fp32", "window 3", "1 threads")
        assert rungs[name].before == rungs["none"].seconds
    assert "diagd-calibrate" in rungs["precision"].reason
    assert "needs a CUDA device" in rungs["CUDA graph"].reason


def test_precisions_are_compared_in_a_form_that_both_have(both: Bundle) -> None:
    graphs = both.manifest.graphs
    twice = (*graphs, *(graph.model_copy(update={"precision": "int8"}) for graph in graphs[:1]))
    bundle = replace(both, manifest=both.manifest.model_copy(update={"graphs": twice}))
    rungs = climb(bundle)
    check_measured(rungs["precision int8"], "prefix form", "against fp32")
    rungs = climb(renamed(both, Form.MODERN, "fp16"))
    assert "the bundle has it as modern" in rungs["precision fp16"].reason


def options_of(bundle: Bundle) -> StepOptions:
    return step_options(bundle.manifest, 3, cpu=CPU)


@pytest.mark.parametrize(("live_prefix", "in_place"), [(False, False), (True, False), (False, True)])
def test_switching_optimisations_off_changes_no_token(
    both: Bundle, live_prefix: bool, in_place: bool
) -> None:
    window, frames = 3, 5
    plain = open_session(both, window=window, cpu=CPU)
    engine = SwitchedEngine(both, options_of(both), live_prefix=live_prefix, in_place=in_place)
    switched = Session(both.manifest, engine, window)
    workload = random_workload(plain, 1, frames)
    tokens = []
    for session in (plain, switched):
        session.start(workload.prompt, workload.prompt_actions)
        run = session.generate(
            frames, workload.actions, schedule=Schedule.chained(LAYOUT, 1), sampling=SamplingSettings(0.0)
        )
        tokens.append(np.stack([frame.tokens for frame in run]))
    np.testing.assert_array_equal(tokens[0], tokens[1])


@needs_kernels
def test_rungs_of_a_device(both: Bundle, workshop: Workshop) -> None:
    """One engine replays what it captured, the other one queues it anew; both are closed."""
    graphs = [graph for graph in both.manifest.graphs if graph.form is Form.MODERN]
    twice = (*graphs, *(graph.model_copy(update={"precision": "fp16"}) for graph in graphs))
    pair = replace(both, manifest=both.manifest.model_copy(update={"graphs": twice}))
    rungs = {rung.name: rung for rung in Ladder(pair, "fp32", 3, CPU, workshop).rows()}
    assert list(rungs) == ["precision fp16", "CUDA graph"]
    for rung in rungs.values():
        assert rung.gain == pytest.approx((rung.before or 0) / (rung.seconds or 1))
    assert "against fp32" in rungs["precision fp16"].held
    replayed = [[entry[0] for entry in device.log].count("replay") for device in workshop.devices]
    steps = REPEATS * Schedule.serial(LAYOUT, 1).table(1, 2, 0, 16).steps
    assert replayed == [steps, steps, 0, steps]
    assert all(device.log[-1] == ("close",) for device in workshop.devices)


@needs_kernels
def test_an_engine_is_closed_when_its_rung_fails(both: Bundle, workshop: Workshop) -> None:
    def fail() -> None:
        if len(workshop.devices[-1].log) > 90:
            raise DiagdError("the device is gone")

    workshop.before_step = fail
    rungs = list(Ladder(both, None, 3, CPU, workshop).rows())
    assert rungs[-1].reason == "the device is gone"
    assert workshop.devices[-1].log[-1] == ("close",)


def test_every_rung_is_shown(both: Bundle) -> None:
    rungs, file = list(climb(both).values()), io.StringIO()
    show(Console(file=file, width=120), rungs)
    text = file.getvalue()
    assert all(rung.name in text for rung in rungs)


def test_it_runs_from_the_command_line(
    both: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ladder", str(both.path), "--window", "3", "--threads", "1"])
    ladder_module.main()
    assert "in-place K/V" in capsys.readouterr().out
