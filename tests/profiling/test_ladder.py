"""The ladder: every optimisation measured against the same step without it, or why not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import Manifest
from diagd.engines.engine import Engine
from diagd.engines.modern import ModernEngine
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.export.exporter import GraphOptions
from diagd.profiling.host_sampling import HostSamplingEngine, without_sampler
from diagd.profiling.ladder import REPEATS, Ladder
from diagd.profiling.measure import random_workload
from diagd.profiling.report import Rung
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session, token_places
from diagd.schedule import Schedule
from tests.models import export_small
from tests.oracles.models import small_model
from tests.profiling.conftest import LAYOUT

CPU = CpuOptions(threads=1, prepack=False)


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


def check_measured(rung: Rung, *held: str) -> None:
    assert rung.seconds is not None
    assert rung.before is not None
    assert rung.gain == pytest.approx(rung.before / rung.seconds)
    for words in held:
        assert words in rung.held


def test_every_rung_is_measured_or_says_why_not(both: Bundle) -> None:
    rungs = {rung.name: rung for rung in Ladder(both, None, 3, CPU).rungs()}
    assert list(rungs) == [
        *("precision", "none", "live-prefix attention", "in-place K/V", "both"),
        *("sampling in the graph", "CUDA graph"),
    ]
    assert rungs["none"].gain == 1.0
    for name in ("none", "live-prefix attention", "in-place K/V", "both"):
        check_measured(rungs[name], "prefix form, fp32", "window 3", "1 threads")
        assert rungs[name].before == rungs["none"].seconds
    check_measured(rungs["sampling in the graph"], "modern form")
    assert "diagd-calibrate" in rungs["precision"].reason
    assert "needs a CUDA device" in rungs["CUDA graph"].reason


def test_precisions_are_compared_in_a_form_that_both_have(both: Bundle) -> None:
    graphs = both.manifest.graphs
    twice = (*graphs, *(graph.model_copy(update={"precision": "int8"}) for graph in graphs[:1]))
    bundle = replace(both, manifest=both.manifest.model_copy(update={"graphs": twice}))
    rungs = {rung.name: rung for rung in Ladder(bundle, None, 3, CPU).rungs()}
    check_measured(rungs["precision int8"], "prefix form", "against fp32")
    apart = Ladder(renamed(both, Form.MODERN, "fp16"), None, 3, CPU)
    rungs = {rung.name: rung for rung in apart.rungs()}
    assert "the bundle has it as modern" in rungs["precision fp16"].reason
    assert "--form prefix,modern" in rungs["sampling in the graph"].reason


def test_without_time_every_rung_is_named(both: Bundle) -> None:
    ladder, asked = Ladder(both, None, 3, CPU), []
    rungs = list(ladder.rungs(asked.append))
    assert [rung.seconds for rung in rungs] == [None] * 4
    assert all("time budget" in rung.reason for rung in rungs[1:3])
    assert asked == [4 * REPEATS, 2 * REPEATS]
    assert ladder.runs == sum(asked)


def test_rungs_that_cannot_be_measured_take_no_time(both: Bundle) -> None:
    modern = replace(
        both,
        manifest=both.manifest.model_copy(
            update={"graphs": tuple(g for g in both.manifest.graphs if g.form is Form.MODERN)}
        ),
    )
    assert Ladder(modern, None, 3, CPU).runs == 2 * REPEATS


def tokens(manifest: Manifest, engine: Engine) -> np.ndarray:
    session = Session(manifest, engine, 3)
    workload = random_workload(session, 1, 5)
    session.start(workload.prompt, workload.prompt_actions)
    frames = session.generate(
        5, workload.actions, schedule=Schedule.chained(LAYOUT, 1), sampling=SamplingSettings(0.9, 6, 0.9)
    )
    return np.stack([frame.tokens for frame in frames])


def test_the_host_draws_what_the_graph_draws(both: Bundle) -> None:
    places = token_places(LAYOUT, 3).size
    with without_sampler(both) as bare:
        by_host = tokens(both.manifest, HostSamplingEngine(bare, places, CPU))
        folder = bare.path
    np.testing.assert_array_equal(by_host, tokens(both.manifest, ModernEngine(both, places, CPU)))
    assert not folder.exists()


def test_the_sampler_is_gone_and_nothing_else(both: Bundle) -> None:
    """What is left is what the logits and the K/V buffers need, by onnx's own reading of the graph."""
    whole = onnx.load(both.file(both.manifest.graph(Form.MODERN).file), load_external_data=False)
    with without_sampler(both) as bare:
        path = bare.file(bare.manifest.graph(Form.MODERN).file)
        left = onnx.load(path, load_external_data=False)
    names = [value.name for value in whole.graph.output]
    assert names[0] == "next_token_buffer"
    assert [value.name for value in left.graph.output] == names[1:]
    made = {name: node for node in whole.graph.node for name in node.output}
    wanted, needed = set(names[1:]), set()
    while wanted:
        if (node := made.get(wanted.pop())) is not None and node.name not in needed:
            needed.add(node.name)
            wanted.update(node.input)
    assert {node.name for node in left.graph.node} == needed
    assert len(needed) < len(whole.graph.node)
    assert left.graph.initializer == whole.graph.initializer
