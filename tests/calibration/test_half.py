"""GPU forms in float16: the graph that the exporter traces, from the one it traced in float32."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from diagd.bundle import Bundle, Form
from diagd.bundle.transformer import linear_rotary
from diagd.calibration.graph_writer import GraphWriter
from diagd.calibration.options import CalibrationOptions
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from diagd.progress import Progress
from diagd.schedule import StreamLayout
from tests.calibration.bundles import load_graph
from tests.models import export_small
from tests.oracles.models import CODES, small_model

SLOTS, WIDTH = 64, 5


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """One model exported in both precisions; gains are not 1, so that nothing is folded away."""
    small = small_model(StreamLayout(2, 3, after=1), context_frames=3).config
    config = replace(small, hidden=64, head_size=32, feed_forward=64, rotary=linear_rotary(32, 1e4))
    model = Transformer(config).initialise(torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    folder, forms = tmp_path_factory.mktemp("half"), (Form.MODERN, Form.PORTABLE)
    return {
        precision: Bundle.open(
            export_small(
                model, folder / f"{precision}.diagd", GraphOptions(forms, precision, widths=(1, WIDTH))
            )
        )
        for precision in ("fp32", "fp16")
    }


@pytest.fixture(scope="module", params=[Form.MODERN, Form.PORTABLE])
def form(request: pytest.FixtureRequest) -> Form:
    chosen: Form = request.param
    return chosen


@pytest.fixture(scope="module")
def converted(bundles: dict[str, Bundle], form: Form) -> Path:
    """The graph of a form with no product quantised."""
    bundle = bundles["fp32"]
    graphs = [graph for graph in bundle.manifest.graphs if graph.form is form]
    written = GraphWriter(bundle, CalibrationOptions("int8"), {}, Progress()).write(graphs, {})
    assert {bundle.manifest.cache_dtype(graph) for graph in written} == {np.dtype(np.float16)}
    return bundle.file(written[0].file)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in load_graph(path).graph.node)


def run(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session, random = onnxruntime.InferenceSession(str(path), options), np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {
        "token_buffer": random.integers(0, CODES, 17, dtype=np.int32),
        "sources": np.arange(WIDTH, dtype=np.int32),
        "positions": np.arange(3, 3 + WIDTH, dtype=np.int32),
        "slot_position": np.arange(SLOTS, dtype=np.int32),
        "write_index": np.asarray([3], np.int64),
    }
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = random.standard_normal(value.shape).astype(np.float16)
    wanted = {value.name: feeds[value.name] for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, wanted), strict=True))


def test_the_converted_graph_is_the_traced_one(
    bundles: dict[str, Bundle], form: Form, converted: Path
) -> None:
    traced = bundles["fp16"].file(f"step.{form.value}.onnx")
    onnx.checker.check_model(str(converted))
    assert operators(converted) == operators(traced)
    expected, seen = run(traced), run(converted)
    assert seen["logits"].dtype == np.float32
    for name, array in expected.items():
        assert seen[name].dtype == array.dtype, name
        np.testing.assert_array_equal(seen[name], array, err_msg=name)


def test_weights_are_stored_in_two_bytes(converted: Path) -> None:
    model = load_graph(converted)
    kinds = {t.name: t.data_type for t in model.graph.initializer if len(t.dims) == 2}
    matrices = [name for name in kinds if name.startswith("transformer.") and "norm" not in name]
    assert len(matrices) > 9
    assert {kinds[name] for name in matrices} == {onnx.TensorProto.FLOAT16}
