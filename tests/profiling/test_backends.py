"""The fastest way to decode a bundle: all are measured, those that fail their gate are not told."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diagd.bundle import Bundle, Form
from diagd.engines.host import cores
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.export.options import GraphOptions
from diagd.profiling.doctor import ABSENT, OK, check_fastest
from diagd.profiling.profile import ProfileOptions, _passes, measure_backends
from diagd.runtime.load import Measurement, Measurements, keep_measured, measured, open_session, with_threads
from tests.models import export_small
from tests.oracles.models import small_model
from tests.profiling.conftest import LAYOUT

QUICK = ProfileOptions(frames=2, prompt=1, window=3)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """In the two forms of a processor, on a machine where nothing was measured."""
    options = GraphOptions((Form.PREFIX, Form.MODERN, Form.PORTABLE), "fp32", (1, 8, 64))
    path = export_small(small_model(LAYOUT, context_frames=4), tmp_path / "a.diagd", options)
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path / "cache"))
    return Bundle.open(path)


def entry(backend: str, precision: str, threads: int, seconds: float, passed: bool | None) -> Measurement:
    found: dict[str, Any] = {"backend": backend, "precision": precision, "computed": precision}
    return Measurement(**found, threads=threads, seconds=seconds, passed=passed)


def test_every_backend_that_runs_here_is_measured_and_kept(bundle: Bundle) -> None:
    assert measured(bundle) is None
    assert check_fastest(bundle).status == ABSENT
    assert check_fastest(bundle).fix == f"diagd profile {bundle.path} --backends"
    found, skipped = measure_backends(bundle, QUICK)
    assert {one.backend for one in found.entries} == {"cpu", "openvino", "openvino_fp32"}
    assert all(one.passed and one.seconds > 0 for one in found.entries)
    assert {left.order.split()[0] for left in skipped} >= {"webgpu", "tensorrt", "tensorrt_rtx"}
    best = found.fastest()
    assert best is not None
    threads = {one.threads for one in found.entries if (one.backend, one.precision) == (best.backend, "fp32")}
    assert {1, cores()} <= threads
    assert measured(bundle) == found
    check = check_fastest(bundle)
    assert (check.status, check.fix) == (OK, best.settings)
    assert str(best) in check.found


def test_another_model_fails_the_gate(bundle: Bundle, tmp_path: Path) -> None:
    other = Bundle.open(export_small(small_model(LAYOUT, context_frames=4, seed=5), tmp_path / "b.diagd"))
    with open_session(other, window=3, cpu=CpuOptions(threads=1)) as session:
        assert _passes(session, other, "fp32") is True
        assert _passes(session, bundle, "fp32") is False
        for_gpus = tuple(graph for graph in bundle.manifest.graphs if graph.form is Form.MODERN)
        without = replace(bundle, manifest=bundle.manifest.model_copy(update={"graphs": for_gpus}))
        assert _passes(session, without, "fp32") is None


def test_the_budget_leaves_out_what_it_has_no_time_for(bundle: Bundle) -> None:
    options = ProfileOptions(frames=2, prompt=1, window=3, budget=1e-9, cpu=CpuOptions(threads=1))
    found, skipped = measure_backends(bundle, options)
    assert [str(one) for one in found.entries] == ["cpu fp32"]
    assert all("of the budget were spent" in left.reason for left in skipped)


def test_threads_are_those_that_were_fastest(bundle: Bundle) -> None:
    assert with_threads(CpuOptions(), bundle).threads == 1  # so few bytes are no work for two
    jacobi = replace(bundle, manifest=bundle.manifest.model_copy(update={"decoder": "jacobi"}))
    assert with_threads(CpuOptions(), jacobi).threads == min(2, cores())  # a window has some dozens of rows
    passed = (entry("cpu", "fp32", 1, 0.2, True), entry("cpu", "fp32", 3, 0.1, True))
    entries = (*passed, entry("cpu", "fp32", 4, 0.05, False), entry("openvino", "fp32", 2, 0.01, None))
    keep_measured(bundle, Measurements(date="2026-01-01", order="k=1 serial", entries=entries))
    assert with_threads(CpuOptions(), bundle).threads == 3
    assert with_threads(CpuOptions(), bundle, "openvino").threads == 2
    assert with_threads(CpuOptions(), bundle, "cuda").threads == 1
    assert with_threads(CpuOptions(5), bundle).threads == 5


def test_another_bundle_and_a_damaged_record_are_as_good_as_none(bundle: Bundle, tmp_path: Path) -> None:
    found = Measurements(date="2026-01-01", order="k=1 serial", entries=(entry("cpu", "fp32", 1, 1.0, True),))
    keep_measured(bundle, found)
    other = Path(shutil.copytree(bundle.path, tmp_path / "other.diagd"))
    assert measured(Bundle.open(other)) == found  # the same model elsewhere
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "small"', '"name": "other"'))
    assert measured(Bundle.open(other)) is None
    (kept,) = (tmp_path / "cache" / "backends").iterdir()
    kept.write_bytes(b"{}")
    assert measured(bundle) is None
