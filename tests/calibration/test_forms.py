"""The same quantised model in every form, and bundles for a GPU alone."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle, Form
from diagd.calibration.options import CalibrationOptions
from diagd.calibration.quantise import STATISTICS, calibrate
from diagd.calibration.report import read_calibration
from diagd.calibration.trajectory import check_memory, open_graphs
from diagd.engines.backend import StepOptions, find
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.export.options import GraphOptions
from diagd.runtime.decoders import JacobiDecoder, ScheduledDecoder
from diagd.runtime.load import open_group, open_session
from diagd.schedule import Schedule
from tests.calibration.bundles import (
    ANYTHING,
    LAYOUT,
    PAST,
    every_scheme,
    frames,
    logits_of,
    measured,
    outlier_model,
    quantise,
)
from tests.engines.webgpu_driver import nodes_on_the_processor
from tests.models import export_small
from tests.oracles.models import CODES

DIFFERENCES = {"int8": 0.02, "int8-weight": 0.02, "int4-weight": 0.05, "fp8": 0.05}
"""Largest relative difference of the logits of two forms; MatMulNBits rounds activations as well."""

WIDTHS = (1, 32)

INDICES = {"Range", "Add", "Mul", "Mod", "Unsqueeze", "Squeeze", "Reshape", "Concat", "Expand"}
"""Operators of the arithmetic with slots and shapes."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_scheme(tmp_path_factory.mktemp("forms") / "small.diagd")


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported for a GPU alone, in float16."""
    path = tmp_path_factory.mktemp("half") / "small.diagd"
    return export_small(outlier_model(), path, GraphOptions((Form.MODERN,), "fp16", widths=WIDTHS))


def logits(path: Path, form: Form, precision: str) -> np.ndarray:
    bundle = Bundle.open(path)
    graphs = [g for g in bundle.manifest.graphs if g.form is form and g.precision == precision]
    engine = open_graphs(bundle, graphs, 4, CpuOptions(1, prepack=False, fuse=False))
    ids = np.random.default_rng(0).integers(0, CODES, 14).astype(np.int32)
    return logits_of(engine, ids, PAST + np.arange(14, dtype=np.int32), slice(None))


@pytest.mark.parametrize("precision", ["int8", "int8-weight"])
def test_sessions_in_lock_step_have_the_tokens_of_runs_alone(bundle: Path, precision: str) -> None:
    """Static scales are of the weights and channels, whoever shares a pass."""
    opened, cpu = Bundle.open(bundle), CpuOptions(1, prepack=False)
    known, actions = frames(3), np.full((9, 1), CODES, np.int32)
    decoders = (
        ScheduledDecoder(Schedule.next_token(LAYOUT)),
        ScheduledDecoder(Schedule.chained(LAYOUT, 1)),
        JacobiDecoder(7),
    )
    with (
        open_group(opened, 3, cpu=cpu, precision=precision, form=Form.PREFIX) as group,
        open_session(opened, cpu=cpu, precision=precision, form=Form.PREFIX) as alone,
    ):
        for decoder in decoders:
            expected = []
            for number, session in enumerate(group.sessions):
                for one in (alone, session):
                    one.start(known[number : number + 1], actions[:1])
                run = alone.frames(decoder, actions, seed=number)
                expected.append([frame.tokens.tolist() for frame in run])
            found: list[list[list[int]]] = [[] for _ in expected]
            for number, frame in group.frames([actions] * 3, decoder):
                found[number].append(frame.tokens.tolist())
            assert found == expected
            assert expected[0] != expected[1]


def relative(near: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(near - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(("precision", "bound"), DIFFERENCES.items())
@pytest.mark.parametrize("form", [Form.MODERN, Form.PORTABLE])
def test_forms_compute_the_same(bundle: Path, form: Form, precision: str, bound: float) -> None:
    if sys.version_info < (3, 11) and precision == "int8":
        pytest.skip("ONNX Runtime 1.23, the last for Python 3.10, rounds float16 to integers otherwise")
    exact = logits(bundle, Form.PREFIX, "fp32")
    seen, reference = logits(bundle, form, precision), logits(bundle, Form.PREFIX, precision)
    assert relative(seen, reference) < bound
    assert relative(seen, exact) < 2 * relative(reference, exact) + 0.01


@pytest.mark.parametrize("precision", ["int8", "int8-weight", "fp8"])
def test_openvino_computes_the_same(bundle: Path, precision: str) -> None:
    chosen = Bundle.open(bundle).at_precision(precision)
    engine = find("openvino_fp32").open_steps(chosen, StepOptions(0, 64, CpuOptions(1)))
    ids = np.random.default_rng(0).integers(0, CODES, 14).astype(np.int32)
    seen = logits_of(engine, ids, PAST + np.arange(14, dtype=np.int32), slice(None))
    reference, exact = logits(bundle, Form.PORTABLE, precision), logits(bundle, Form.PREFIX, "fp32")
    assert relative(seen, reference) < DIFFERENCES[precision]
    assert 1e-3 < relative(seen, exact) < 2 * relative(reference, exact) + 0.01


@pytest.mark.parametrize("precision", ["fp32", "int4-weight", "int8-weight"])
def test_products_and_cache_stay_on_a_gpu_behind_webgpu(bundle: Path, precision: str) -> None:
    """All that is left to the processor is the indices of the slots that a step writes, and shapes."""
    operators = {node.split()[0] for node in nodes_on_the_processor(bundle, precision)}
    assert operators <= INDICES


@pytest.mark.parametrize("precision", DIFFERENCES)
def test_a_bundle_for_a_gpu_alone_is_calibrated_on_the_cpu(halved: Path, precision: str) -> None:
    options = CalibrationOptions(precision, ANYTHING, steps=64, threads=1, floor=-100.0)
    report = calibrate(Bundle.open(halved), options, frames())
    assert report.reference == "fp16"
    assert measured(report)["predictions"] > 500
    assert 0 < measured(report)["divergence"] < 0.5
    assert len({layer.divergence for layer in report.layers}) == 2  # one layer and the head
    graphs = [g for g in Bundle.open(halved).manifest.graphs if g.precision == precision]
    assert [graph.width for graph in graphs] == [*WIDTHS]
    exact = logits(halved, Form.MODERN, "fp16")
    assert 1e-4 < relative(logits(halved, Form.MODERN, precision), exact) < 0.3


def test_statistics_of_a_fixed_form_are_those_of_the_prefix_form(
    bundle: Path, halved: Path, tmp_path: Path
) -> None:
    """Pad rows are not seen; prompts are fed in other chunks, which moves what the passes are spent on."""
    target = shutil.copytree(halved, tmp_path / "a.diagd")
    if not (target / STATISTICS).is_file():
        quantise(target, "int8", budget=None)
    seen = [np.load(path / STATISTICS) for path in (bundle, target)]
    name = "transformer.layers.0.attention.qkv"
    rows = [int(arrays[f"{name}.rows"]) for arrays in seen]
    assert abs(rows[0] - rows[1]) < 0.05 * rows[0]
    power = [arrays[f"{name}.power"] / count for arrays, count in zip(seen, rows, strict=True)]
    np.testing.assert_allclose(power[0], power[1], rtol=0.2)


def test_engines_that_do_not_fit_into_memory_are_refused_with_the_figure(halved: Path) -> None:
    bundle = Bundle.open(halved)
    graph = bundle.manifest.graph(Form.MODERN)
    stored = bundle.manifest.files["weights.bin"].bytes
    check_memory(bundle, graph, 2, 4 * stored)
    check_memory(bundle, graph, 2, None)
    with pytest.raises(UsageError, match="--budget none"):
        check_memory(bundle, graph, 2, stored)


def test_a_scheme_that_no_form_can_have_is_refused(halved: Path, bundle: Path) -> None:
    with pytest.raises(UsageError, match="has no prefix graph: TensorRT has no product"):
        calibrate(Bundle.open(halved), CalibrationOptions("int8-dynamic"), frames())
    quantise(bundle, "int8-dynamic", budget=None)
    whole = read_calibration(bundle / "calibration")
    assert whole is not None
    assert set(whole.precisions) == {*DIFFERENCES, "int8-dynamic"}
    assert set(whole.precisions["int8-dynamic"].left_out) == {"modern", "portable"}
    assert whole.precisions["int4-weight"].left_out == {}
