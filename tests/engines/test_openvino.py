"""OpenVINO: the precision it is told and no other, quantised graphs, pictures; tokens are in test_modern."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle, Form
from diagd.engines import host
from diagd.engines.backend import StepOptions, find
from diagd.engines.host import instruction_sets
from diagd.engines.processor import BFLOAT16_UNITS, OpenVino, widths_upto
from diagd.errors import BundleError, DependencyError, EngineError
from diagd.export.options import GraphOptions
from diagd.play.opening import SHIPPED
from diagd.profiling.measure import random_workload
from diagd.profiling.verify import Verdict, candidates, open_reference, verify
from diagd.runtime.pixels import PixelCodec
from diagd.schedule import Schedule
from tests.calibration.bundles import quantise
from tests.engines.opening import CPU
from tests.models import LATER_RUNTIME, export_small
from tests.oracles.models import CODES, small_model
from tests.profiling.conftest import LAYOUT


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = GraphOptions((Form.PREFIX, Form.MODERN, Form.PORTABLE), "fp32", (1, 8, 64))
    model = small_model(LAYOUT, context_frames=4)
    return Bundle.open(export_small(model, tmp_path_factory.mktemp("openvino") / "small.diagd", options))


def verdict_of(bundle: Bundle, backend: str) -> Verdict:
    """Of two frames."""
    (candidate,) = candidates(bundle, backend, 3, CPU)
    with candidate.session, open_reference(bundle, candidate.session) as plain:
        workload = random_workload(candidate.session, 1, 2)
        return verify(
            *(candidate.session, plain, candidate.name, candidate.precision),
            *(Schedule.chained(LAYOUT, 1), workload, 2),
        )


def test_it_computes_in_the_precision_that_it_says(bundle: Bundle) -> None:
    exact, fast = verdict_of(bundle, "openvino_fp32"), verdict_of(bundle, "openvino")
    half = bool(BFLOAT16_UNITS & instruction_sets())
    assert exact.engine == "openvino_fp32 fp32"
    assert fast.engine == ("openvino fp32 in bf16" if half else "openvino fp32")
    assert exact.passed and exact.error < 1e-5
    assert fast.passed and (fast.error > 1e-3) == half


def test_narrow_steps_have_few_pads() -> None:
    assert widths_upto(1) == (1,)
    assert widths_upto(5) == (1, 2, 3, 4, 5)
    for widest in (14, 64, 65, 256):
        widths = np.array(widths_upto(widest))
        assert widths[-1] == widest
        assert (np.diff(widths) > 0).all()
        rows = np.arange(1, min(widest, 32) + 1)
        padded = widths[np.searchsorted(widths, rows)]
        assert (padded - rows <= padded / 6).all()


def test_tensors_of_a_step_are_compared(bundle: Bundle) -> None:
    (candidate,) = candidates(bundle, "openvino_fp32", 3, CPU)
    with candidate.session:
        found = candidate.tensors()
    assert {"logits", "new_key_0"} <= {verdict.tensor for verdict in found}
    assert all(verdict.passed for verdict in found)


def test_pictures_are_those_of_the_processor() -> None:
    shipped = Bundle.open(SHIPPED)
    ours, theirs = (PixelCodec(shipped, CPU, find(name)) for name in ("cpu", "openvino"))
    tokens = np.random.default_rng(0).integers(0, CODES, (2, 9, 12), dtype=np.int32)
    pictures, others = (np.stack(list(codec.decode(iter(tokens)))) for codec in (ours, theirs))
    assert np.abs(pictures.astype(int) - others).max() <= 1
    np.testing.assert_array_equal(ours.encode(pictures), theirs.encode(pictures))


def test_limits_are_those_of_its_own_product() -> None:
    ceilings = find("openvino").ceilings(1)
    assert ceilings.threads == 1
    assert min(ceilings.copied, ceilings.read, ceilings.peak) > 1e8


@pytest.mark.parametrize("backend", ["openvino", "openvino_fp32"])
def test_products_that_would_overflow_are_refused(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "rounded.diagd"))
    quantise(copy, "int8", budget=None)
    rounded, options = Bundle.open(copy).at_precision("int8"), StepOptions(0, 80, CPU)
    for flags in ({"avx2", "avx512f"}, {"avx2", "avx_vnni"}, {"avx512_vnni"}, set()):
        monkeypatch.setattr(host, "instruction_sets", partial(frozenset, flags))
        if {"avx_vnni", "avx512_vnni"} & flags:
            find(backend).open_steps(rounded, options).close()
            continue
        with pytest.raises(EngineError, match=r"int8 in 16 bits .* without VNNI.*backend=cpu"):
            find(backend).open_steps(rounded, options)
        find(backend).open_steps(bundle.at_precision("fp32"), options).close()


def test_graphs_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    graph = tmp_path / "step.onnx"
    graph.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"OpenVINO .* refuses .*step\.onnx"):
        OpenVino().open_graph(graph, "", CPU)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=LATER_RUNTIME), "openvino"])
def test_weights_that_are_elsewhere_are_told(bundle: Bundle, tmp_path: Path, backend: str) -> None:
    linked = Path(shutil.copytree(bundle.path, tmp_path / "linked.diagd"))
    (linked / "weights.bin").rename(tmp_path / "moved.bin")
    (linked / "weights.bin").symlink_to(tmp_path / "moved.bin")
    with pytest.raises(BundleError, match=r"files of .*linked\.diagd are links.*cp -rL"):
        find(backend).open_steps(Bundle.open(linked), StepOptions(0, 80, CPU))


def test_without_the_package_the_line_that_installs_it_is_told(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for work in (OpenVino().describe, lambda: OpenVino().open_steps(bundle, StepOptions(0, 80, CPU))):
        with pytest.raises(DependencyError, match=r"pip install 'diagd\[openvino\]'"):
            work()
