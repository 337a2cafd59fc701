"""``diagd calibrate``: what it prints, what it leaves, what it says of bad input."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle
from diagd.calibration import quantise
from diagd.calibration.options import CalibrationOptions
from diagd.cli.calibrate import CalibrateOptions
from diagd.cli.main import main
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.runtime.pictures import read_frames
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.video import VideoWriter
from tests.cli.conftest import Workplace
from tests.cli.test_generate import generate

LOOSE = "agreement=0,nll=1000,psnr=0"


@pytest.fixture(scope="module")
def place(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A copy of the workplace whose bundle may change, and shares its files until then."""
    folder = tmp_path_factory.mktemp("calibrated")
    bundle = shutil.copytree(workplace.bundle, folder / "world.diagd", copy_function=os.link)
    return Workplace(folder, workplace.world, bundle, workplace.prompt, workplace.actions)


def calibrate(place: Workplace, *options: str) -> int:
    return main(["calibrate", str(place.bundle), "--data", str(place.prompt), *options])


def test_a_quantised_graph_is_added_and_runs(
    workplace: Workplace, place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [graph.precision for graph in Bundle.open(place.bundle).manifest.graphs]
    assert calibrate(place, "--precision", "int8", "--budget", LOOSE, "--set", "steps=64") == 0
    printed = capsys.readouterr().out
    assert "int8 accepted in" in printed
    assert "greedy agreement" in printed
    precisions = [graph.precision for graph in Bundle.open(place.bundle).manifest.graphs]
    assert before[0] == "fp32"
    assert [graph.precision for graph in Bundle.open(workplace.bundle).manifest.graphs] == ["fp32"]
    assert precisions == [*before, "int8"]
    report = json.loads((place.bundle / "calibration" / "report.json").read_text())["precisions"]["int8"]
    assert report["bytes_after"] < 0.4 * report["bytes_before"]
    assert report["attempts"][-1]["figures"]["psnr"] is not None
    assert sum(entry["steps"] for entry in report["trajectories"]) >= 64
    tokens = {}
    for precision in ("fp32", "int8"):
        output = tmp_path / f"{precision}.npy"
        assert generate(place, output, "--set", f"precision={precision}") == 0
        tokens[precision] = np.load(output)
    assert tokens["int8"].shape == tokens["fp32"].shape
    assert not np.array_equal(tokens["int8"], tokens["fp32"])


def test_frames_of_another_shape_are_cut_where_the_tokenizer_cuts_them(
    workplace: Workplace, tmp_path: Path
) -> None:
    bundle, video = Bundle.open(workplace.bundle), tmp_path / "wide.gif"
    with VideoWriter(video, 10, (36, 96)) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (36, 96, 3), dtype=np.uint8))
    options = CalibrateOptions(CalibrationOptions("int8"), workplace.bundle, data=video, resize=True)
    tokenizer = bundle.manifest.tokenizer
    assert tokenizer is not None
    found = []
    for cover in (False, True):
        spec = tokenizer.model_copy(update={"cover": cover})
        cutting = replace(bundle, manifest=bundle.manifest.model_copy(update={"tokenizer": spec}))
        tokens = options.tokens(cutting)
        pictures = read_frames(video, (36, 48), resize=True, cover=cover)
        assert tokens is not None
        np.testing.assert_array_equal(tokens, PixelCodec(cutting, CpuOptions(1)).encode(pictures))
        found.append(tokens)
    assert not np.array_equal(found[0], found[1])


def test_a_breach_prints_the_figures_and_exits_with_one(
    place: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "ATTEMPTS", 1)  # what more there are is tested where they are
    before = (place.bundle / "manifest.json").read_bytes()
    budget = "agreement=1.5,nll=1000,psnr=0"
    assert calibrate(place, "--precision", "int4-weight", "--budget", budget, "--set", "steps=64") == 1
    printed = capsys.readouterr()
    assert "divergence" in printed.out
    assert "the bundle is unchanged" in printed.err
    assert (place.bundle / "manifest.json").read_bytes() == before


def test_without_a_budget_nothing_is_judged(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(place.bundle), "--precision", "int8-dynamic", "--budget", "none"]) == 0
    assert "int8-dynamic written, not judged," in capsys.readouterr().out
    content = json.loads((place.bundle / "calibration" / "report.json").read_text())
    assert content["schema_version"] == 2
    entry = content["precisions"]["int8-dynamic"]
    assert entry["budget"] is None
    assert entry["attempts"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int3"], "unknown precision 'int3'"),
        (["--precision", "int8-weight", "--set", "steps=9"], "at least 64"),
        (["--precision", "int8-weight", "--set", "floats=fp8"], "unknown floats"),
        (["--precision", "int8-weight", "--set", "range=mean"], "unknown option of --set 'range'"),
        (["--precision", "int8-weight", "--budget", "speed=1"], "unknown budget"),
    ],
)
def test_bad_options_are_refused(
    place: Workplace, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert calibrate(place, *options) == 2
    assert message in capsys.readouterr().err


def test_a_precision_that_is_missing_says_how_to_make_it(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(workplace, tmp_path / "a.npy", "--set", "precision=fp8") == 2
    error = capsys.readouterr().err
    assert "it has fp32" in error
    assert "diagd-calibrate" in error
