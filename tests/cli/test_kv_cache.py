"""A WHAM from export to frames with an int8 cache, by the commands a user gives."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle, Form
from diagd.calibration import quantise
from diagd.cli.main import main
from diagd.engines.executor import Executor
from diagd.export.exporter import export, random_sources
from diagd.export.families import Family, wham
from diagd.export.options import GraphOptions
from diagd.profiling.cost import read_model
from diagd.runtime.load import load
from diagd.runtime.slots import TokenPlaces
from tests.models import LATER_RUNTIME

pytestmark = LATER_RUNTIME
CODES, FRAMES, LAYERS = 64, 4, 2
BUDGET = ("--budget", "agreement=0,nll=0.05,psnr=0")
"""Random weights: logits are too even for the most probable token to mean much."""


@dataclass
class Place:
    bundle: Path
    prompt: Path
    actions: Path


def small_wham() -> Family:
    config = wham.transformer_config(
        grid=(3, 5), codes=CODES, frames=FRAMES, hidden=128, layers=LAYERS, heads=4, bias=True
    )
    return wham.family("small-wham", wham.Variant(config, norm_weights=True, tokenizer=None))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A bundle calibrated to ``int4-weight`` with an int8 cache, a prompt and actions."""
    folder = tmp_path_factory.mktemp("wham")
    family = small_wham()
    options = GraphOptions((Form.PREFIX, Form.PORTABLE), widths=(1, 32))
    made = Place(folder / "wham.diagd", folder / "prompt.npy", folder / "actions.jsonl")
    export(family, options, random_sources(family, 0), made.bundle)
    np.save(made.prompt, np.random.default_rng(8).integers(1, CODES, (1, 3, 5)).astype(np.int32))
    made.actions.write_text('{"repeat": 6}\n')
    assert calibrate(made, "--precision", "int4-weight", "--kv-cache", "int8") == 0
    return made


def calibrate(place: Place, *options: str) -> int:
    fixed = ("--set", "steps=64", "--set", "threads=1", "--set", "floor=-100", *BUDGET)
    return main(["calibrate", str(place.bundle), *fixed, *options])


def test_the_bundle_says_what_its_cache_is(place: Place) -> None:
    manifest = Bundle.open(place.bundle).manifest
    added = [graph for graph in manifest.graphs if graph.precision == "int4-weight-kv8"]
    assert [(graph.form, graph.width, graph.cache_dtype) for graph in added] == [
        (Form.PORTABLE, 1, "int8"),
        (Form.PORTABLE, 32, "int8"),
    ]
    assert set(manifest.files) == {
        *("step.onnx", "step.portable.onnx", "weights.bin"),
        *("step.portable.int4-weight-kv8.onnx", "weights.portable.int4-weight-kv8.bin"),
        *("calibration/int4-weight-kv8.png", "calibration/report.json", "calibration/statistics.npz"),
    }
    written = json.loads((place.bundle / "calibration" / "report.json").read_text())["precisions"]
    report = written["int4-weight-kv8"]
    assert report["attempts"][-1]["figures"]["nll"] < 0.05
    assert report["forms"] == {"portable": "step.portable.int4-weight-kv8.onnx"}
    assert report["left_out"] == {"prefix": "attention reads the buffers as they lie, the cache is int8"}
    token = 2 * LAYERS * 4 * 32
    assert (report["kv_cache"]["bytes_before"], report["kv_cache"]["bytes_after"]) == (4 * token, token)
    assert min(report["kv_cache"]["signal_to_noise"].values()) > 35


def test_a_step_reads_a_quarter_of_the_cache(place: Place) -> None:
    bundle = Bundle.open(place.bundle)
    plain = read_model(bundle.at_precision("fp32"))
    small = read_model(bundle.at_precision("int4-weight-kv8"))
    assert (plain.cache_bytes, small.cache_bytes) == (4, 1)
    live = FRAMES * (3 * 5 + 16)
    saved = (plain.cache_bytes - small.cache_bytes) * plain.size.cache_elements * live
    assert saved == 3 * 2 * LAYERS * 128 * live
    assert small.streamed_bytes < 0.4 * plain.streamed_bytes


def generated(place: Place, output: Path, *options: str) -> np.ndarray:
    files = ("--prompt", str(place.prompt), "--actions", str(place.actions), "--output", str(output))
    assert main(["generate", str(place.bundle), *files, "--set", "temperature=0", *options]) == 0
    frames: np.ndarray = np.load(output)
    return frames


def test_frames_are_generated_past_the_window(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = generated(place, tmp_path / "a.npy", "--set", "precision=int4-weight-kv8")
    assert "6 frames in" in capsys.readouterr().out
    assert frames.shape == (6, 3, 5)
    assert len(np.unique(frames)) > 5
    exact = generated(place, tmp_path / "b.npy")
    assert 0.1 < (frames == exact).mean() < 1  # other weights, other tokens
    session = load(place.bundle, precision="int4-weight-kv8", threads=1)
    places = TokenPlaces(session.layout, FRAMES).size
    assert isinstance(session.engine, Executor)
    tensors = session.engine.tensors
    assert {tensor.dtype for tensor in tensors.cache.values()} == {np.dtype(np.int8)}
    assert tensors.token_buffer.shape == (places,)


def test_bytes_are_shown(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place.bundle)]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "2,048 (float32: " in shown
    assert "512 (int8: portable int4-weight-kv8)" in shown


def test_a_second_run_writes_the_same_scales(place: Place, tmp_path: Path) -> None:
    again = Place(tmp_path / "again.diagd", place.prompt, place.actions)
    shutil.copytree(place.bundle, again.bundle)
    assert calibrate(again, "--precision", "int8-weight", "--kv-cache", "int8") == 0
    scales = [scales_of(again.bundle / f"step.portable.{name}.onnx") for name in KINDS]
    assert scales[0].keys() == scales[1].keys()
    for name, scale in scales[0].items():
        np.testing.assert_array_equal(scale, scales[1][name])


KINDS = ("int4-weight-kv8", "int8-weight-kv8")


def scales_of(file: Path) -> dict[str, np.ndarray]:
    import onnx

    tensors = onnx.load(file, load_external_data=False).graph.initializer
    named = {t.name: t for t in tensors if t.name.startswith(("kv.key_", "kv.value_"))}
    assert len(named) == 2 * LAYERS
    return {name: onnx.numpy_helper.to_array(tensor) for name, tensor in named.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int4-weight", "--kv-cache", "int8"], "has int4-weight-kv8 graphs already"),
        (["--precision", "int8", "--kv-cache", "int7"], "unknown K/V cache 'int7'; did you mean 'int8'"),
        (["--precision", "int8-dynamic", "--kv-cache", "int8"], "int8-dynamic is for the prefix form"),
    ],
)
def test_what_cannot_be_is_refused(
    place: Place, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert calibrate(place, *options) == 2
    assert message in capsys.readouterr().err


def test_a_bundle_without_the_form_is_refused(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.open(place.bundle)
    only = tuple(graph for graph in bundle.manifest.graphs if graph.form is Form.PREFIX)
    target = Place(tmp_path / "prefix.diagd", place.prompt, place.actions)
    shutil.copytree(place.bundle, target.bundle)
    manifest = bundle.manifest.model_copy(update={"graphs": only})
    (target.bundle / "manifest.json").write_text(manifest.model_dump_json())
    assert calibrate(target, "--precision", "int8", "--kv-cache", "int8") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "TensorScatter takes floating point only" in error
    assert "--form prefix,portable" in error


def test_a_breach_of_the_budget_leaves_the_bundle(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "ATTEMPTS", 1)  # what more there are is tested where they are
    before = sorted((file.name, file.stat().st_size) for file in place.bundle.rglob("*"))
    assert calibrate(place, "--precision", "int8", "--kv-cache", "int8", "--budget", "nll=1e-9") == 1
    assert "int8-kv8 is outside its budget" in " ".join(capsys.readouterr().err.split())
    assert sorted((file.name, file.stat().st_size) for file in place.bundle.rglob("*")) == before


def test_a_missing_cache_is_made_by_the_line_that_is_shown(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (
        "--prompt",
        str(place.prompt),
        "--actions",
        str(place.actions),
        "--output",
        str(tmp_path / "a.npy"),
    )
    assert main(["generate", str(place.bundle), *given, "--set", "precision=fp8-kv8"]) == 2
    assert "--precision fp8 --kv-cache int8" in " ".join(capsys.readouterr().err.split())


def test_a_bundle_for_a_gpu_alone_is_judged_by_its_own_graph(place: Place, tmp_path: Path) -> None:
    """In half precision, without a prefix graph: rows are watched, and compared, as the device has them."""
    alone = Place(tmp_path / "gpu.diagd", place.prompt, place.actions)
    options = GraphOptions((Form.PORTABLE,), "fp16", widths=(1, 32))
    export(small_wham(), options, random_sources(small_wham(), 0), alone.bundle)
    assert calibrate(alone, "--precision", "int8-weight", "--kv-cache", "int8") == 0
    manifest = Bundle.open(alone.bundle).manifest
    assert [graph.cache_dtype for graph in manifest.graphs] == [None, None, "int8", "int8"]
    report = json.loads((alone.bundle / "calibration" / "report.json").read_text())
    cache = report["precisions"]["int8-weight-kv8"]["kv_cache"]
    assert cache["bytes_before"] == 2 * cache["bytes_after"]
    assert min(cache["signal_to_noise"].values()) > 35
    tokens = [
        generated(alone, tmp_path / f"{name}.npy", "--set", f"precision={name}")
        for name in ("fp16", "int8-weight-kv8")
    ]
    assert (tokens[0] == tokens[1]).mean() > 0.5
