"""The GPU benchmark, over memory of the host and by hand-made results; a GPU is only what it lacks here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import benchmarks.gpu_measure as gpu_checks
import benchmarks.gpu_measure as gpu_measure
from benchmarks.gpu import MODELS, SAMPLERS, main, missing
from benchmarks.gpu_measure import (
    CHECKS,
    PARTS,
    Bench,
    cases,
    first_steps,
    make_bundle,
    samplers,
    stored_weights,
    widths_of,
)
from benchmarks.gpu_report import (
    BEGIN,
    END,
    JACOBI,
    Check,
    Results,
    Row,
    markdown,
    verdicts,
    write_section,
)
from diagd.bundle import Bundle, Form
from diagd.bundle.transformer import grid_rotary
from diagd.engines.backend import graphs_of
from diagd.engines.ceilings import Ceilings
from diagd.engines.devices.cuda import open_driver
from diagd.engines.executor import Executor
from diagd.engines.host import processor_name
from diagd.engines.onnxruntime_session import nodes_outside
from diagd.errors import DiagdError, UsageError
from diagd.export.exporter import random_sources
from diagd.export.families import Family, find
from diagd.export.transformer import Transformer
from diagd.schedule import StreamLayout
from tests.engines.host_device import HostDevice, executor_over, host_kernels
from tests.models import small_family
from tests.oracles.models import small_model

CEILINGS = Ceilings(4e12, 0.0, 8e14, 0)
LAYOUT = StreamLayout(4, 6, after=2)


@pytest.fixture(scope="module")
def family() -> Family:
    """As Cosmos is made, only small."""
    config = small_model(LAYOUT).config
    rotary = grid_rotary(8, 1e4, trained=(3, 40))
    return small_family(Transformer(replace(config, qk_norm=True, rotary=rotary)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def bundle(family: Family, folder: Path) -> Bundle:
    return make_bundle(family, folder, 3)


def test_a_bundle_is_made_once_with_the_widths_of_its_schedules(
    family: Family, folder: Path, bundle: Bundle
) -> None:
    layout = bundle.manifest.layout
    graphs = graphs_of(bundle, Form.MODERN)
    assert {graph.precision for graph in graphs} == {"fp16"}
    assert tuple(graph.width for graph in graphs) == widths_of(layout, 3)
    made = bundle.path.stat().st_mtime_ns
    assert make_bundle(family, folder, 3).path.stat().st_mtime_ns == made


def test_other_precisions_are_beside_it(family: Family, folder: Path, bundle: Bundle) -> None:
    rounded = make_bundle(family, folder, 3, "int4-weight")
    assert rounded.path == bundle.path
    assert {graph.precision for graph in graphs_of(rounded, Form.MODERN)} == {"int4-weight"}
    assert {graph.precision for graph in graphs_of(make_bundle(family, folder, 3), Form.MODERN)} == {"fp16"}


@pytest.mark.parametrize(
    ("model", "widths"), [("mineworld-300m", (1, 16, 24, 32, 40)), ("cosmos-4b", (1, 32, 40, 72))]
)
def test_every_step_fits_the_graphs(model: str, widths: tuple[int, ...]) -> None:
    layout = find(model, None).transformer.layout
    assert widths_of(layout, 3) == widths
    assert find(model, None).transformer.context_frames >= max(e.known + e.frames for e in cases(layout, 3))
    steps = {case.name: case.table.steps for case in cases(layout, 3)}
    cells = layout.cells
    assert steps["NTP"] == cells
    if model == "cosmos-4b":
        assert 3 * cells / steps["k=1 chained"] == pytest.approx(42, abs=0.1)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_measured(
    family: Family, bundle: Bundle, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_measure, "REPEATS", 1)
    monkeypatch.setattr(gpu_measure, "captured", lambda form: form._forward)  # the compiler takes minutes
    devices = []

    def make(bundle: Bundle, tokens: int, graphs: bool) -> Executor:
        devices.append(HostDevice(host_kernels()))
        return executor_over(bundle, Form.MODERN, tokens, devices[-1], graphs=graphs)

    rows = Bench(make, CEILINGS, 3, torch_device="cpu").measure(bundle, family, part)
    layout = bundle.manifest.layout
    wanted = {case.name: (case.frames, case.table.steps) for case in cases(layout, 3)}
    found = {row.schedule: (row.frames, row.steps) for row in rows}
    frames, passes = found.pop(JACOBI, (1, 1))
    assert found == wanted and (frames == 1) and 1 <= passes <= layout.cells
    assert (JACOBI in {row.schedule for row in rows}) == ("published" not in part)
    assert all(row.seconds > 0 and row.times_floor > 1 and row.bytes_read > 1e4 for row in rows)
    assert all((row.host is None) == ("published" in part) for row in rows)
    for device in devices:
        assert (Counter(entry[0] for entry in device.log)["replay"] > 0) == (part == PARTS[0])
        assert device.log[-1] == ("close",)
    assert len(devices) == ("published" not in part)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_what_is_to_be_timed_is_checked(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "REPLAYS", 60)
    kernels = host_kernels()
    broken: list[HostDevice] = []

    class Forgetful(HostDevice):
        """Its graphs lose their last kernel, the sampler, from the thirtieth replay on."""

        def replay(self, graph: int) -> None:
            if len([entry for entry in self.log if entry[0] == "replay"]) == 30:
                del self._graphs[graph][-1]
            super().replay(graph)

    def make(bundle: Bundle, tokens: int, graphs: bool) -> Executor:
        kind = Forgetful if broken else HostDevice
        return executor_over(bundle, Form.MODERN, tokens, kind(kernels), graphs=graphs)

    for name, check in CHECKS.items():
        passed, figures = check(bundle, make)
        assert passed and all(np.isfinite(list(figures.values()))), name
    assert CHECKS["replays of alternating widths"](bundle, make)[1]["steps that differ"] == 0
    broken.append(HostDevice(kernels))
    passed, figures = CHECKS["replays of alternating widths"](bundle, make)
    assert not passed and figures["steps that differ"] > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_samplers_are_checked(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    monkeypatch.setattr(gpu_checks, "VOCABULARIES", (107, 600))
    monkeypatch.setattr(gpu_checks, "LAUNCHES", 2)
    passed, figures = samplers(HostDevice(host_kernels() if compiled else None))
    assert passed and len(figures) == 6 and all(value > 0 for value in figures.values())


def test_a_stage_that_fails_or_hangs_takes_nothing_with_it(tmp_path: Path) -> None:
    """A dry run in which two stages of a model that is not there are left."""
    model, file = "none-such", tmp_path / "results.json"
    names, (failing, hanging) = (SAMPLERS, *list(CHECKS)[:2], PARTS[1]), (PARTS[3], list(CHECKS)[2])
    checks = [Check(model=model, name=name, passed=True, figures={}) for name in names]
    Results(device=processor_name(), checks=checks).write(file)
    common = ["--folder", str(tmp_path), "--backend", "cpu", "--model", model]
    command = [sys.executable, "-m", "benchmarks.gpu", *common]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, check=False)

    assert missing(Results.read(file, processor_name()), [model], "cpu") == [
        *((model, stage) for stage in (hanging, PARTS[0], failing))
    ]
    hung = run("--box", "0.01", "--budget", "0.005")
    assert f"{model}: {hanging} took more than 0.01 s" in hung.stderr
    assert hung.returncode == 1 and "type the same line again" in hung.stdout
    failed = run("--stage", failing)
    assert f"{model}: {failing} cannot be measured: UsageError: unknown model" in failed.stderr
    assert failed.returncode == 1
    assert Results.read(file, processor_name()).checks == checks
    assert "| none-such | samplers | passed |" in hung.stdout


def test_nodes_of_another_provider_are_named(bundle: Bundle) -> None:
    """On the CPU, where every node is the CPU's: all of the graph lies outside of CUDA, but for its sizes."""
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    graph = bundle.file(graphs_of(bundle, Form.MODERN)[0].file)
    session = onnxruntime.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
    outside = Counter(name.split()[0] for name in nodes_outside(session))
    assert outside["Attention"] == bundle.manifest.cache.layers
    assert outside["TensorScatter"] == 2 * bundle.manifest.cache.layers
    assert "Shape" not in outside
    assert nodes_outside(session, "CPUExecutionProvider") == []


def test_the_published_form_gets_the_weights_of_the_bundle(family: Family, bundle: Bundle) -> None:
    """Random norms are all ones, and the graph has only one of them."""
    weights = stored_weights(bundle, family)
    expected = family.weights(random_sources(family, 0).transformer)
    assert weights.keys() >= expected.keys()
    for name, source in expected.items():
        chunks = np.concatenate(list(source.chunks())).astype(np.float16)
        np.testing.assert_array_equal(weights[name], chunks)


def row(model: str, runtime: str, schedule: str, steps: int, seconds: float, frames: int = 3) -> Row:
    return Row(
        model=model,
        runtime=runtime,
        schedule=schedule,
        frames=frames,
        steps=steps,
        seconds=seconds,
        host=0.1 * seconds,
        bytes_read=8e9,
        operations=4e10,
        bandwidth=4e12,
        peak=8e14,
    )


def test_verdicts_are_of_the_worst_schedule() -> None:
    """A step needs 2 ms. NTP takes 2.5 ms; 183 steps of 2.9 ms gain 0.86 of 42."""
    results = Results(
        device="a",
        rows=[
            row("cosmos-4b", PARTS[0], "NTP", 2560, 2560 * 2.5e-3, 1),
            row("cosmos-4b", PARTS[0], "k=1 chained", 183, 183 * 2.9e-3),
            row("cosmos-4b", PARTS[0], "k=2 chained", 302, 302 * 9e-3),
            row("cosmos-4b", PARTS[1], "k=2 chained", 302, 302 * 3.1e-3),
            row("cosmos-4b", PARTS[2], "k=1 chained", 183, 183 * 2.9e-3 * 4),
            row("cosmos-4b", PARTS[3], "k=1 chained", 183, 183 * 2.9e-3 * 8),
        ],
    )
    found = {(v.model, v.target[:9]): (v.measured, v.word) for v in verdicts(results)}
    assert found == {
        ("cosmos-4b", "step with"): ("1.55 (k=2 chained)", "missed"),
        ("mineworld-300m", "step with"): ("", "not measured"),
        ("cosmos-4b", "wall-cloc"): ("0.81 (k=2 chained)", "missed"),
        ("cosmos-4b", "at least "): ("4.00 (k=1 chained)", "missed"),
        ("mineworld-300m", "wall-cloc"): ("", "not measured"),
        ("mineworld-300m", "at least "): ("", "not measured"),
    }
    shown = markdown(results)
    assert "| diagd, CUDA graphs | k=1 chained | 61 | 2.900 | 2,759 | 69% | 5.65 | 10% | 0.86 |" in shown
    assert (
        "| `cosmos-4b` | wall-clock gain at least 0.85 of the step ratio | 0.81 (k=2 chained) | missed |"
        in shown
    )


def test_the_section_alone_is_written(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    file.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\n## After\n")
    write_section(file, "new")
    write_section(file, "newer")
    assert file.read_text() == f"# Before\n\n{BEGIN}\n\nnewer\n\n{END}\n\n## After\n"
    for broken in ("no markers", f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}"):
        file.write_text(broken)
        with pytest.raises(UsageError, match="has no place for the tables"):
            write_section(file, "new")
        assert file.read_text() == broken


def test_the_documents_have_the_place() -> None:
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index("## GPU") < text.index(BEGIN) < text.index(END)


def test_results_are_kept_between_calls(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    results = Results.read(file, "gpu")
    quantised = {"cosmos-4b:int4-weight"}
    parts = {model: PARTS[:2] if model in quantised else PARTS for model in MODELS}
    stages = [(model, stage) for model in MODELS for stage in (*CHECKS, *parts[model])]
    assert missing(results, MODELS) == [(MODELS[0], SAMPLERS), *stages]
    results.rows.append(row("cosmos-4b", PARTS[0], "NTP", 2560, 7.0, 1))
    results.write(file)
    assert json.loads(file.read_text())["rows"][0]["steps"] == 2560
    again = Results.read(file, "gpu")
    again.checks.append(Check(model="cosmos-4b", name=SAMPLERS, passed=False, figures={"us": 3.0}))
    left = [stage for stage in (*CHECKS, *PARTS) if stage != PARTS[0]]
    assert missing(again, ["cosmos-4b"]) == [("cosmos-4b", stage) for stage in left]
    assert not any("compiled" in stage for _, stage in missing(again, ["cosmos-4b"], "cpu"))
    assert "| cosmos-4b | samplers | **failed** | us 3 |" in markdown(again)
    with pytest.raises(UsageError, match="has results of gpu, this is another"):
        Results.read(file, "another")


def test_a_warm_up_is_the_beginning_of_a_run(bundle: Bundle) -> None:
    table = next(iter(cases(bundle.manifest.layout, 3))).table
    short = first_steps(table, 5)
    assert short.steps == 5
    assert (short.step(4).positions == table.step(4).positions).all()
    assert first_steps(table, 10**6).steps == table.steps


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cuda.bindings.driver")
    try:
        open_driver()
    except DiagdError:
        command = ["gpu", "--folder", str(tmp_path / "new")]
        monkeypatch.setattr("sys.argv", command)
        assert main() == 0
        assert capsys.readouterr().out.startswith("skipped: no CUDA device")
        monkeypatch.setattr("sys.argv", [*command, "--write", str(tmp_path / "nothing.md")])
        assert main() == 1
        assert "has no place for the tables" in capsys.readouterr().out
        assert not (tmp_path / "new").exists()
    else:
        pytest.skip("this machine has a CUDA device")
