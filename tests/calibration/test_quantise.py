"""Every scheme on real graphs: what they compute, what is refused, what stays as it was."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from diagd.bundle import Bundle, Form
from diagd.calibration.graph_writer import GraphWriter
from diagd.calibration.options import Budget, CalibrationOptions
from diagd.calibration.quantise import RejectedError, calibrate
from diagd.calibration.report import read_calibration
from diagd.calibration.search import Choice
from diagd.engines.backend import StepOptions, find
from diagd.engines.engine import VOID
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import PrefixEngine
from diagd.errors import BundleError, QualityError, UsageError
from diagd.export.options import GraphOptions
from diagd.export.step_graph import projections
from diagd.progress import Progress
from diagd.runtime.decoders.draft import LikelihoodScorer
from diagd.runtime.load import load
from diagd.runtime.sampling import SamplingSettings
from tests.calibration.bundles import (
    LAYOUT,
    PAST,
    engine_of,
    frames,
    load_graph,
    logits_of,
    measured,
    quantise,
)
from tests.engines.opening import run_step
from tests.models import export_small
from tests.oracles.models import CODES, small_model

SCHEMES = {"int8": 0.06, "int8-dynamic": 0.06, "int8-weight": 0.06, "int4-weight": 0.4, "fp8": 0.2}
"""Largest relative error of the logits of the small model."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a CPU and a GPU graph; one channel of every norm is an outlier."""
    model = small_model(LAYOUT, context_frames=6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter[3] *= 20
    options = GraphOptions((Form.PREFIX, Form.MODERN), widths=(8,))
    return export_small(model, tmp_path_factory.mktemp("plain") / "small.diagd", options)


@pytest.fixture(scope="module")
def quantised(plain: Path) -> Path:
    """The same with every scheme."""
    target = plain.with_name("quantised.diagd")
    shutil.copytree(plain, target)
    for precision in SCHEMES:
        quantise(target, precision)
    return target


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    ids = random.integers(0, CODES, 14).astype(np.int32)
    return ids, (PAST + random.permutation(14)).astype(np.int32)


def alone(bundle: Path, precision: str, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits of rows fed one at a time."""
    engine = engine_of(bundle, precision)
    each = range(len(ids))
    return np.concatenate(
        [logits_of(engine, ids[n : n + 1], positions[n : n + 1], slice(None)) for n in each]
    )


@pytest.mark.parametrize(("precision", "bound"), SCHEMES.items())
def test_logits_are_near_those_of_fp32(quantised: Path, precision: str, bound: float) -> None:
    ids, positions = rows()
    exact = logits_of(engine_of(quantised, "fp32"), ids, positions, slice(None))
    near = logits_of(engine_of(quantised, precision), ids, positions, slice(None))
    error = float(np.linalg.norm(near - exact) / np.linalg.norm(exact))
    assert 1e-4 < error < bound


def test_a_models_own_likelihood_is_recorded_for_each_precision(quantised: Path) -> None:
    """And taken by scorers of drafts, which measure nearly the same behind prompts of their own."""
    likelihoods = Bundle.open(quantised).manifest.likelihoods
    assert [own.precision for own in likelihoods] == ["fp32", *SCHEMES]
    for own in (likelihoods[0], likelihoods[2]):
        with load(quantised, threads=1, precision=own.precision) as session:
            session.start(frames(3), np.full((3, 1), CODES, np.int32))
            scorer = LikelihoodScorer.recorded(session)
            assert scorer is not None
            assert (scorer.mean, scorer.deviation) == (own.mean, own.deviation)
            led = list(np.full((8, 1), CODES, np.int32))
            now = LikelihoodScorer.measured(session, led, 8)
            assert now.mean == pytest.approx(own.mean, abs=3 * own.deviation)
            assert LikelihoodScorer.recorded(session, SamplingSettings(0.5)) is None


@pytest.mark.parametrize("form", [Form.PREFIX, Form.MODERN])
@pytest.mark.parametrize(
    ("precision", "bound"),
    [
        ("int8", 1e-3),
        ("int8-dynamic", 1e-3),
        ("int8-weight", 0.03),
    ],  # the last ones round activations as well
)
def test_processors_without_vnni_compute_the_same(
    quantised: Path, precision: str, bound: float, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where libraries are told to sum exactly, which they refuse for some graphs."""
    bundle, ids = Bundle.open(quantised).at_precision(precision), np.arange(8, dtype=np.int32)
    if not any(graph.form is form for graph in bundle.manifest.graphs):
        pytest.skip("TensorRT has no such product")
    found = []
    for vnni in (True, False):
        monkeypatch.setattr("diagd.engines.onnxruntime_session.sums_eight_bits", lambda vnni=vnni: vnni)
        options = StepOptions(96, 64, CpuOptions(1, prepack=False), form)
        with contextlib.closing(find("cpu").open_steps(bundle, options)) as engine:
            engine.write_slots(np.full(engine.capacity, VOID, np.int32))
            engine.write_tokens(ids, ids)
            found.append(run_step(engine, ids, ids, ids, ids, 0, 8).copy())
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=bound * np.abs(found[0]).max())


def test_static_int8_does_not_depend_on_the_batch(quantised: Path) -> None:
    ids, positions = rows()
    whole = logits_of(engine_of(quantised, "int8"), ids, positions, slice(None))
    order = np.random.default_rng(1).permutation(14)
    permuted = logits_of(engine_of(quantised, "int8"), ids[order], positions[order], slice(None))
    garbage = np.asarray([7, 7], np.int32)
    padded = logits_of(
        engine_of(quantised, "int8"),
        np.concatenate([ids, garbage]),
        np.concatenate([positions, garbage]),
        slice(0, 14),
    )
    assert np.array_equal(permuted, whole[order])
    assert np.array_equal(padded, whole)
    assert np.array_equal(alone(quantised, "int8", ids, positions), whole)


def test_every_graph_is_valid_and_shares_what_it_does_not_change(quantised: Path) -> None:
    manifest = Bundle.open(quantised).manifest
    graphs = {(graph.form, graph.precision): graph.file for graph in manifest.graphs}
    assert {precision for form, precision in graphs if form is Form.PREFIX} == {"fp32", *SCHEMES}
    assert {precision for form, precision in graphs if form is Form.MODERN} == {
        "fp32",
        "int8",
        "int8-weight",
        "int4-weight",
        "fp8",
    }
    for (form, precision), file in graphs.items():
        onnx.checker.check_model(str(quantised / file), full_check=False)
        model = load_graph(quantised / file)
        places = {
            entry.value
            for t in model.graph.initializer
            for entry in t.external_data
            if entry.key == "location"
        }
        halved = form is Form.MODERN and precision != "fp32"  # nothing large is as it was
        assert ("weights.bin" in places) == (not halved)
        if precision != "fp32":
            assert len(places) == 2 - halved
            assert not {node.op_type for node in model.graph.node} & {"DynamicQuantizeLinear"}
        if form is Form.MODERN:
            inlined = onnx.inliner.inline_local_functions(model)
            assert {node.domain for node in inlined.graph.node} == {""}


@pytest.mark.parametrize("precision", ["int8", "int8-weight", "int4-weight", "fp8"])
def test_gpu_graphs_hold_the_weights_of_fp32_to_a_step(quantised: Path, precision: str) -> None:
    """Weights read back by ONNX's own reference, migration undone by the product they belong to."""
    bundle = Bundle.open(quantised)
    file = next(g.file for g in bundle.manifest.graphs if g.form is Form.MODERN and g.precision == precision)
    model = onnx.load(str(quantised / file))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    name = "transformer.layers.1.attention.out"  # nothing migrates into it or out of it
    node = next(node for node in model.graph.node if node.input[0] == f"{name}.q")
    graph = onnx.helper.make_graph(
        [node],
        "weight",
        [],
        [onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)],
        [tensors[name] for name in node.input],
    )
    opsets = [onnx.helper.make_opsetid("", 24)]
    results = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets)).run(None, {})
    assert isinstance(results, list)
    read = results[0]
    plain = onnx.load(str(quantised / "step.onnx"))
    exact = onnx.numpy_helper.to_array(next(t for t in plain.graph.initializer if t.name == name))
    error = np.abs(read - exact).max() / np.abs(exact).max()
    assert error < {"int8": 0.005, "int8-weight": 0.005, "int4-weight": 0.16, "fp8": 0.04}[precision]
    assert error > 0


@pytest.mark.parametrize("kept", ["", "gate_up"])
def test_factors_cancel_exactly(plain: Path, tmp_path: Path, kept: str) -> None:
    """Factors in gains and columns leave the logits alone, whether or not their product is quantised."""
    target = shutil.copytree(plain, tmp_path / "wild.diagd")
    base, random = Bundle.open(target), np.random.default_rng(0)
    choices = {
        p.name: Choice(0.5, random.uniform(0.5, 2, p.inputs).astype(np.float32), None, 0.0)
        for p in projections(base.manifest.transformer)
        if p.fold is not None and not (kept and kept in p.name)
    }
    writer = GraphWriter(base, CalibrationOptions("int8-weight", floats="fp32"), {}, Progress())
    written = writer.write([base.manifest.graph(Form.PREFIX)], choices)
    tensors = {tensor.name: tensor for tensor in load_graph(target / written[0].file).graph.initializer}
    name = "transformer.layers.0.feed_forward.gate_up"
    assert (name in tensors) == bool(kept)
    if kept:  # its columns took the factors of what comes behind: it is no longer the bundle's own
        assert tensors[name].external_data[0].value == "weights.int8-weight.bin"
    bundle = Bundle(target, base.manifest.model_copy(update={"graphs": written}))
    ids, positions = rows()
    engine = PrefixEngine(bundle, StepOptions(96, 64, CpuOptions(1, prepack=False)))
    near = logits_of(engine, ids, positions, slice(None))
    exact = logits_of(engine_of(plain, "fp32"), ids, positions, slice(None))
    assert np.linalg.norm(near - exact) < 0.05 * np.linalg.norm(exact)


def test_without_any_quantised_product_logits_are_those_of_fp32(plain: Path, tmp_path: Path) -> None:
    target = shutil.copytree(plain, tmp_path / "kept.diagd")
    report = quantise(target, "int8", floor=1000.0)
    assert len(report.excluded) == len(report.layers) == 9
    ids, positions = rows()
    exact = logits_of(engine_of(target, "fp32"), ids, positions, slice(None))
    assert np.array_equal(logits_of(engine_of(target, "int8"), ids, positions, slice(None)), exact)


def test_a_second_run_finds_the_same_scales(plain: Path, quantised: Path, tmp_path: Path) -> None:
    again = shutil.copytree(plain, tmp_path / "again.diagd")
    quantise(again, "int8")
    for file in ("weights.int8.bin", "step.int8.onnx"):
        assert (again / file).read_bytes() == (quantised / file).read_bytes()
    other = shutil.copytree(plain, tmp_path / "other.diagd")
    quantise(other, "int8", seed=9)
    assert (other / "step.int8.onnx").read_bytes() != (quantised / "step.int8.onnx").read_bytes()


def test_a_failed_gate_leaves_the_bundle_as_it_was(plain: Path, tmp_path: Path) -> None:
    target = shutil.copytree(plain, tmp_path / "a.diagd")
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(RejectedError, match=r"NLL rises by .* unchanged") as caught:
        quantise(target, "int4-weight", budget=Budget(agreement=0, nll=1e-9, psnr=0))
    assert caught.value.exit_code == 1
    assert measured(caught.value.report)["nll"] > 1e-9
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.diagd"]


def test_layers_below_the_floor_stay_in_floating_point(plain: Path, tmp_path: Path) -> None:
    target = shutil.copytree(plain, tmp_path / "a.diagd")
    errors = sorted(layer.signal_to_noise for layer in quantise(target, "int8-dynamic").layers)
    target = shutil.copytree(plain, tmp_path / "b.diagd")
    report = quantise(target, "int8-dynamic", floor=(errors[2] + errors[3]) / 2)
    assert len(report.excluded) == 3
    names = {t.name for t in load_graph(target / "step.int8-dynamic.onnx").graph.initializer}
    assert set(report.excluded) <= names
    written = read_calibration(target / "calibration")
    assert written is not None
    assert written.precisions["int8-dynamic"] == report
    assert {layer.excluded for layer in report.layers} == {None, "floor"}
    assert (target / "calibration" / "int8-dynamic.png").stat().st_size > 5000


def test_what_cannot_be_calibrated_is_refused(plain: Path, quantised: Path) -> None:
    bundle = Bundle.open(plain)
    with pytest.raises(UsageError, match=r"trained model.*--data"):
        calibrate(bundle, CalibrationOptions("int8"))
    with pytest.raises(UsageError, match="63 calibration steps; expected at least 64"):
        calibrate(bundle, CalibrationOptions("int8", steps=63), frames())
    with pytest.raises(UsageError, match="unknown precision 'int9'"):
        calibrate(bundle, CalibrationOptions("int9"), frames())
    with pytest.raises(UsageError, match="has int8 graphs already"):
        calibrate(Bundle.open(quantised), CalibrationOptions("int8"), frames())
    with pytest.raises(UsageError, match="no graph in floating point"):
        calibrate(Bundle.open(quantised).at_precision("int8"), CalibrationOptions("fp8"), frames())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = small_model(LAYOUT, layers=1, context_frames=6)
    with torch.no_grad():
        model.get_parameter("layers.0.attention_norm.weight")[0] = float("inf")
    bundle = export_small(model, tmp_path / "broken.diagd")
    with pytest.raises(QualityError, match="no finite numbers"):
        quantise(bundle, "int8")


def test_a_layer_that_is_always_zero_is_calibrated_like_others(tmp_path: Path) -> None:
    """As that of a pruned head, or of one that training has not reached: other schemes follow."""
    model = small_model(LAYOUT, layers=1, context_frames=6)
    with torch.no_grad():
        model.get_parameter("layers.0.feed_forward.gate_up").zero_()
    bundle = export_small(model, tmp_path / "a.diagd", GraphOptions((Form.PREFIX, Form.MODERN), widths=(8,)))
    for precision in ("int8", "fp8", "int4-weight"):
        layers = quantise(bundle, precision).layers
        assert np.isfinite([layer.signal_to_noise for layer in layers]).all()
        graph = onnx.load(str(bundle / f"step.modern.{precision}.onnx"))
        scales = [tensor for tensor in graph.graph.initializer if tensor.name.endswith("scale")]
        assert scales
        assert all((onnx.numpy_helper.to_array(scale) > 0).all() for scale in scales)


def test_a_report_that_cannot_be_added_to_is_found_ahead_of_the_work(plain: Path, tmp_path: Path) -> None:
    target = shutil.copytree(plain, tmp_path / "a.diagd")
    (target / "calibration").mkdir()
    (target / "calibration" / "report.json").write_text('{"schema_version": 9}')
    with pytest.raises(BundleError, match=r"a\.diagd/calibration/report\.json: field 'schema_version'"):
        quantise(target, "int8")


def test_each_layer_is_measured_by_itself(plain: Path, tmp_path: Path) -> None:
    target = shutil.copytree(plain, tmp_path / "a.diagd")
    report = quantise(target, "int8-dynamic")
    alone = {layer.name: layer.divergence for layer in report.layers}
    assert all(value is not None and 0 < value < 0.1 for value in alone.values()), alone
    assert len(set(alone.values())) == 3  # two layers and the head
    assert not list(target.glob("single*"))
