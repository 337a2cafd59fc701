"""Engines against each other, tensor by tensor."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle, Form, read_manifest, seal
from diagd.engines.backend import graphs_of
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.processor import open_fixed
from diagd.export.options import GraphOptions
from diagd.profiling.verify import Tensors, capture_feeds, compare_tensors, plain_outputs, tolerance_of
from diagd.runtime.load import session_over, step_options
from tests.engines.host_device import HostDevice, executor_over, host_kernels
from tests.models import export_small
from tests.oracles.models import small_model
from tests.profiling.conftest import LAYOUT

CPU = CpuOptions(threads=1, prepack=False)
WIDTHS = (1, 4, 16)
FORMS = (Form.MODERN, Form.PORTABLE)
BOUND = tolerance_of("fp32").error


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("tensors") / "both.diagd"
    model = small_model(LAYOUT, layers=2, context_frames=4)
    return Bundle.open(export_small(model, path, GraphOptions(FORMS, widths=WIDTHS)))


def graph_of(bundle: Bundle, form: Form) -> Path:
    return bundle.file(graphs_of(bundle, form)[0].file)


def feeds_of(bundle: Bundle, form: Form) -> Tensors:
    engine = open_fixed(bundle, form, step_options(bundle.manifest, 4, cpu=CPU))
    return capture_feeds(session_over(bundle, engine, 4, CPU), engine, engine.padded_widths)


@pytest.fixture(scope="module")
def altered(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle with other output weights of the first layer's attention: its own keys stay right."""
    import onnx
    from onnx import numpy_helper

    folder = tmp_path_factory.mktemp("altered") / "altered.diagd"
    shutil.copytree(bundle.path, folder)
    graph = graph_of(bundle, Form.MODERN)
    model = onnx.load(folder / graph.name, load_external_data=False)
    (weight,) = (t for t in model.graph.initializer if t.name.endswith("layers.0.attention.out"))
    onnx.load_external_data_for_model(whole := onnx.load(graph), str(bundle.path))
    (found,) = (numpy_helper.to_array(t) for t in whole.graph.initializer if t.name == weight.name)
    weight.CopyFrom(numpy_helper.from_array(np.float32(1.3) * found, weight.name))
    onnx.save(model, folder / graph.name)
    seal(folder, read_manifest(folder))
    return Bundle.open(folder)


def test_a_captured_step_is_a_real_one(bundle: Bundle) -> None:
    """The widest frontier of the frame, in the middle of a context: cells of two frames are live."""
    feeds = feeds_of(bundle, Form.MODERN)
    assert len(np.unique(feeds["positions"])) >= LAYOUT.rows  # one decodes in each row
    live = int(feeds["live"][0])
    assert 2 * LAYOUT.frame_length < live < 3 * LAYOUT.frame_length
    assert np.abs(feeds["past_key_1"]).max() > 0
    rows = (feeds["slot_position"] <= feeds["positions"].max()).sum()
    assert rows > 2 * LAYOUT.frame_length


@pytest.mark.parametrize("form", FORMS)
def test_onnxruntime_against_itself(bundle: Bundle, form: Form, capsys: pytest.CaptureFixture[str]) -> None:
    feeds = feeds_of(bundle, form)
    plain = plain_outputs(graph_of(bundle, form), feeds)
    engine = open_fixed(bundle, form, step_options(bundle.manifest, 4, cpu=CPU))
    found = compare_tensors("optimised", engine.evaluate(feeds, list(plain)), plain, BOUND)
    assert [verdict.tensor.rsplit("_", 2)[-2:] for verdict in found[1:]] == [
        *(["key", "0"], ["value", "0"], ["key", "1"], ["value", "1"])
    ]
    assert found[0].tensor == "logits"
    assert all(verdict.passed and verdict.error < 1e-5 for verdict in found)
    assert capsys.readouterr() == ("", "")


def test_a_planted_difference_is_found_where_it_begins(bundle: Bundle, altered: Bundle) -> None:
    feeds = feeds_of(bundle, Form.MODERN)
    right, wrong = (plain_outputs(graph_of(one, Form.MODERN), feeds) for one in (bundle, altered))
    found = compare_tensors("altered", wrong, right, BOUND)
    verdicts = {verdict.tensor: verdict for verdict in found}
    assert {name for name, verdict in verdicts.items() if verdict.passed} == {
        "present_key_0",
        "present_value_0",
    }
    assert verdicts["present_key_1"].error > 1e-3


def test_what_is_no_number_fails(bundle: Bundle) -> None:
    right = plain_outputs(graph_of(bundle, Form.MODERN), feeds_of(bundle, Form.MODERN))
    broken = right | {"logits": np.full_like(right["logits"], np.nan)}
    found = compare_tensors("broken", broken, right, BOUND)
    assert [verdict.tensor for verdict in found if not verdict.passed] == ["logits"]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.parametrize("form", FORMS)
def test_an_engine_on_a_device(bundle: Bundle, form: Form) -> None:
    """Its program over its own tensors, where caches are written in place."""
    feeds = feeds_of(bundle, form)
    engine = executor_over(bundle, form, len(feeds["token_buffer"]), HostDevice(host_kernels()))
    plain = plain_outputs(graph_of(bundle, form), feeds)
    found = compare_tensors("device", engine.evaluate(feeds, list(plain)), plain, BOUND)
    assert len(found) == 5
    assert all(verdict.passed and verdict.error < 1e-5 for verdict in found)
