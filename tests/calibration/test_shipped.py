"""The shipped model in INT8, judged on a world recorded here and now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle
from diagd.calibration.gate import Budget
from diagd.calibration.quantise import CalibrationOptions, calibrate
from diagd.export.exporter import GraphOptions, export, open_sources
from diagd.export.families.registry import find
from diagd.export.families.world import SHIPPED
from diagd.world.collect import CollectOptions, collect
from diagd.world.dataset import cached_tokens
from diagd.world.model import load_world


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Token frames int32 [P, 9, 12] of one episode."""
    folder = tmp_path_factory.mktemp("recording")
    list(collect(CollectOptions(folder, episodes=1, steps=80, seed=3_000_000, processes=1)))
    streams = cached_tokens(folder, load_world(SHIPPED / "crafter-3m").codebook).streams
    return streams[:, 1:].reshape(-1, 9, 12).astype(np.int32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = find("crafter-3m")
    path = tmp_path_factory.mktemp("shipped") / "crafter.diagd"
    return export(family, GraphOptions(), open_sources(family, None, None), path).path


@pytest.mark.parametrize("precision", ["int8", "int8-weight", "int8-dynamic", "int4-weight", "fp8"])
def test_every_scheme_passes_the_gate(bundle: Path, recording: np.ndarray, precision: str) -> None:
    budget = replace(Budget(), nll=0.02 if precision == "int4-weight" else Budget().nll)
    options = CalibrationOptions(precision, budget, steps=480, threads=1)
    report = calibrate(Bundle.open(bundle), options, recording)
    assert report.figures["predictions"] > 1000
    assert report.figures["agreement"] >= 0.99
    assert 0 < report.figures["nll"] <= budget.nll
    assert report.figures["psnr"] > 35
    assert report.bytes_after < 0.45 * report.bytes_before
    assert report.kept == []
