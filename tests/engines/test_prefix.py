"""The CPU engine: buffers allocated once, bound once, updated in place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import diagd
from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import MANIFEST_NAME
from diagd.engines.devices.kernels import host_build
from diagd.engines.onnxruntime_session import CpuOptions, open_cpu_session
from diagd.engines.prefix import GRANULE, PrefixEngine
from diagd.engines.tensors import aligned_zeros, rotate_pairs
from diagd.errors import BundleError, EngineError
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from diagd.runtime import load
from diagd.runtime.decoders import ScheduledDecoder
from diagd.runtime.session import Session
from diagd.schedule import Schedule, StreamLayout
from tests.engines.opening import prefix_engine, run_step
from tests.models import export_small
from tests.oracles.models import CODES, small_model

LAYOUT = StreamLayout(4, 6, before=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_small(small_model(LAYOUT, context_frames=6), tmp_path_factory.mktemp("engine") / "a.diagd")


def run(session: Session, frames: int) -> list[np.ndarray]:
    session.start(np.arange(24, dtype=np.int32).reshape(1, 4, 6) % CODES, np.full((1, 1), CODES))
    actions = np.full((frames, 1), CODES, np.int32)
    decoded = session.generate(frames, actions, schedule=Schedule.serial(LAYOUT, 1))
    return [frame.tokens for frame in decoded]


def test_no_step_copies_or_reallocates_keys_and_values(bundle: Path) -> None:
    session = diagd.load(bundle, threads=1)
    engine = session.engine
    assert isinstance(engine, PrefixEngine)
    addresses = {name: buffer.ctypes.data for name, buffer in engine.buffers.items()}
    bound, first = [], 0
    session.start(np.arange(24, dtype=np.int32).reshape(1, 4, 6) % CODES, np.full((1, 1), CODES))
    written = engine.buffers["key_1"].copy()
    actions = np.full((3, 1), CODES, np.int32)
    for step, _ in session.steps(ScheduledDecoder(Schedule.serial(LAYOUT, 1)), actions):
        bound.append([value.data_ptr() for value in engine.outputs[1:]])
        changed = np.flatnonzero((written != engine.buffers["key_1"]).any((1, 2)))
        assert changed.tolist() == list(range(first, first + step.width))
        first, written = first + step.width, engine.buffers["key_1"].copy()
    assert bound
    assert all(pointers == list(addresses.values()) for pointers in bound)
    assert {name: buffer.ctypes.data for name, buffer in engine.buffers.items()} == addresses


def test_a_step_without_rows_changes_nothing(bundle: Path) -> None:
    engine, nothing = prefix_engine(Bundle.open(bundle), 64, 200), np.zeros(0, np.int32)
    for buffer in engine.buffers.values():
        buffer[:] = 7
    assert len(run_step(engine, nothing, nothing, nothing, nothing, 0, 1)) == 0
    assert all((buffer == 7).all() for buffer in engine.buffers.values())


def test_products_with_large_matrices_are_a_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path / "cache"))
    config = replace(small_model(LAYOUT, layers=1).config, feed_forward=1 << 15)
    model = Transformer(config).initialise(torch.Generator().manual_seed(0)).eval()
    bundle = Bundle.open(export_small(model, tmp_path / "large.diagd"))
    nodes = onnx.load(bundle.file("step.onnx"), load_external_data=False).graph.node
    assert [node.op_type for node in nodes].count("BoundProduct") == 2  # gate and up in one, and down
    ids, places = np.arange(9, dtype=np.int32), np.arange(9, dtype=np.int32)
    engine = prefix_engine(bundle, 64, 9, CpuOptions(threads=1))
    engine.write_tokens(places, ids)
    found = run_step(engine, places, places, places, places, 0, 9)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids).long()[None], torch.from_numpy(places).long())[0]
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    kernels = host_build()  # where it multiplies, it packs the weights: nothing is kept
    assert bool(list(tmp_path.glob("cache/prepacked/*"))) != (
        kernels is not None and kernels.diagd_packs(0) == 1
    )


def test_the_bound_prefix_follows_the_slots_in_use(bundle: Path) -> None:
    session = diagd.load(bundle, threads=1)
    engine = session.engine
    assert isinstance(engine, PrefixEngine)
    lengths = set()
    bind = engine._bind_prefix

    def watch(length: int) -> None:
        lengths.add(length)
        bind(length)

    engine._bind_prefix = watch  # type: ignore[method-assign]
    run(session, 2)
    used = LAYOUT.frame_start(3) + 2 * (LAYOUT.rows - 1)
    assert lengths == set(range(GRANULE, -(-used // GRANULE) * GRANULE + 1, GRANULE))
    assert max(lengths) < engine.capacity


def test_packed_weights_are_kept_and_change_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path))
    plain = run(diagd.load(bundle, threads=1, prepack=False), 2)
    assert not list(tmp_path.glob("prepacked/*"))
    first = run(diagd.load(bundle, threads=1), 2)
    packed = list(tmp_path.glob("prepacked/*/step.onnx"))
    assert len(packed) == 1
    stamp = packed[0].stat().st_mtime_ns
    second = run(diagd.load(bundle, threads=1), 2)
    assert packed[0].stat().st_mtime_ns == stamp
    for other in (first, second):
        np.testing.assert_array_equal(plain, other)


def test_packed_weights_are_those_of_the_library_that_runs_the_graph(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path))
    frames = run(diagd.load(bundle, threads=1), 2)
    for module in ("devices.kernels", "onnxruntime_session"):
        monkeypatch.setattr(f"diagd.engines.{module}.host_build", lambda: None)
    np.testing.assert_array_equal(run(diagd.load(bundle, threads=1), 2), frames)
    assert len(list(tmp_path.glob("prepacked/*/step.onnx"))) == 2


def test_graphs_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    graph = tmp_path / "step.onnx"
    graph.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"refuses .*step\.onnx"):
        open_cpu_session(graph, "digest", CpuOptions(1, prepack=False))


@pytest.mark.parametrize("form", [Form.PREFIX, Form.MODERN])
def test_graphs_of_another_form_than_the_manifest_says_are_refused(form: Form, tmp_path: Path) -> None:
    options = GraphOptions((Form.PREFIX, Form.MODERN), widths=(16,))
    path = export_small(small_model(LAYOUT, context_frames=6), tmp_path / "a.diagd", options)
    manifest = Bundle.open(path).manifest
    files = [graph.file for graph in manifest.graphs]
    swapped = [g.model_copy(update={"file": f}) for g, f in zip(manifest.graphs, files[::-1], strict=True)]
    bundle = Bundle(path, manifest.model_copy(update={"graphs": tuple(swapped)}))
    with pytest.raises(BundleError, match="export it again"):
        load.open_session(bundle, cpu=CpuOptions(1, prepack=False), form=form)


@pytest.mark.parametrize(
    ("backend", "form"),
    [("cpu", Form.PREFIX), ("cpu", Form.MODERN), ("openvino", Form.PORTABLE)],
    ids=["prefix", "modern", "openvino"],
)
@pytest.mark.parametrize(
    "part", ["cache.kv_heads", "cache.head_size", "cache.layers", "transformer.vocabulary"]
)
def test_manifests_with_other_sizes_than_their_graphs_are_refused(
    part: str, backend: str, form: Form, tmp_path: Path
) -> None:
    if backend == "openvino" and part == "transformer.vocabulary":
        pytest.skip("OpenVINO takes ids beyond the table")
    options = GraphOptions((Form.PREFIX, Form.MODERN, Form.PORTABLE), widths=(16,))
    path = export_small(small_model(LAYOUT, context_frames=6), tmp_path / "a.diagd", options)
    file, (group, name) = path / MANIFEST_NAME, part.split(".")
    tree = json.loads(file.read_text())
    tree[group][name] *= 2
    file.write_text(json.dumps(tree))
    unknown = np.full((1, 4, 6), CODES + 6)  # ids that the graph has no row for
    said = "cannot run a step" if group == "transformer" else "export it again"
    with (
        pytest.raises(BundleError, match=said),
        load.open_session(
            Bundle.open(path), cpu=CpuOptions(1, prepack=False), form=form, backend=backend
        ) as session,
    ):
        session.start(unknown, np.full((1, 1), CODES))
        session.step(np.full(1, CODES))


def test_buffers_start_on_a_cache_line_and_hold_zeros() -> None:
    for _ in range(20):
        buffer = aligned_zeros((3, 5, 7), np.dtype(np.float32))
        assert buffer.ctypes.data % 64 == 0
        assert not buffer.any()


def test_turning_keys_equals_complex_multiplication() -> None:
    random = np.random.default_rng(0)
    keys = random.standard_normal((6, 2, 8)).astype(np.float32)
    angles = random.uniform(-9, 9, 4)
    expected = (keys[..., :4] + 1j * keys[..., 4:]) * np.exp(1j * angles)
    rotate_pairs(keys, angles)
    np.testing.assert_allclose(keys[..., :4] + 1j * keys[..., 4:], expected, atol=1e-5)
