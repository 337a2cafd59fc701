"""An int8 K/V cache: against an oracle that rounds rows the same way, and what cannot have one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import AbsoluteContext, RotaryContext
from diagd.calibration.search import HEADROOM, InputStatistics, describe_cache, row_scales
from diagd.engines.executor import Executor
from diagd.engines.tensors import cache_tensors, rotate_pairs
from diagd.export.transformer import Transformer
from diagd.schedule import RowSeed, Schedule, StreamLayout
from tests.calibration.bundles import load_graph
from tests.calibration.int8_cache import RoundedRecompute, export_rounded, grouped_model, random_scales
from tests.engines.fidelity import Run, decode, stream_of
from tests.engines.fidelity import recompute as recompute_exactly
from tests.engines.host_device import buffers
from tests.engines.opening import portable, prefix, run_step
from tests.oracles.full_recompute import lengthened
from tests.oracles.models import CODES
from tests.oracles.rows import rows_of
from tests.runtime.test_fidelity import frames_of

LAYOUT = StreamLayout(3, 5, after=2)
RUNS = {
    "next token": Run(Schedule.next_token(LAYOUT), frames=1, prompt=1),
    "chained": Run(Schedule.chained(LAYOUT, 1), prompt=1),
    "serial": Run(Schedule(LAYOUT, 2, Schedule.serial(LAYOUT, 2).d, RowSeed.ABOVE), prompt=1),
}
SLIDING = Run(Schedule.chained(LAYOUT, 2), frames=11, prompt=1, window=3)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return grouped_model(LAYOUT)


@pytest.fixture(scope="module")
def bundle(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_rounded(model, tmp_path_factory.mktemp("kv") / "small.diagd", random_scales(model))


def recompute(model: Transformer, run: Run) -> np.ndarray:
    layout, stream = run.schedule.layout, stream_of(run)
    oracle = RoundedRecompute(
        lengthened(model, run.prompt + run.frames), sampled=range(CODES), window=run.window
    )
    oracle.scales = random_scales(model)
    oracle.run(rows_of(run.schedule.table(run.prompt, run.frames, 0)), stream)
    return frames_of(stream, layout, run.prompt, run.frames)


@pytest.mark.parametrize("name", RUNS)
def test_tokens_are_those_of_an_oracle_that_rounds_rows(
    model: Transformer, bundle: Bundle, name: str
) -> None:
    expected = recompute(model, RUNS[name])
    np.testing.assert_array_equal(decode(bundle, portable, RUNS[name]), expected)
    np.testing.assert_array_equal(decode(bundle, prefix, RUNS[name]), expected)


@pytest.mark.parametrize("name", ["chained", "serial"])
def test_without_rounding_the_tokens_are_others(model: Transformer, name: str) -> None:
    assert (recompute(model, RUNS[name]) == recompute_exactly(model, RUNS[name])).mean() < 0.8


def test_every_head_may_have_rows_of_its_own(tmp_path: Path) -> None:
    """Full multi-head attention over learned positions."""
    model = grouped_model(LAYOUT, layers=1, rotary=False, kv_heads=4)
    bundle = export_rounded(model, tmp_path / "small.diagd", random_scales(model))
    expected = recompute(model, RUNS["serial"])
    np.testing.assert_array_equal(decode(bundle, portable, RUNS["serial"]), expected)


def test_a_window_slides_over_integers(model: Transformer, bundle: Bundle) -> None:
    """Rows are evicted and written over, and cached keys are turned back as integers."""
    assert isinstance(bundle.manifest.context, RotaryContext)
    context = bundle.manifest.context.positions
    frames = decode(bundle, portable, SLIDING)
    assert LAYOUT.frame_start(SLIDING.prompt + SLIDING.frames) > context  # positions had to be turned back
    expected = recompute(model, SLIDING)
    first_turned = 6  # rounding twice may change a token of the frames behind
    np.testing.assert_array_equal(frames[:first_turned], expected[:first_turned])
    assert (frames == expected).mean() > 0.9


def rows_in(engine: Executor, batches: list[list[int]]) -> dict[str, np.ndarray]:
    """Feed positions in batches; returns the buffers."""
    engine.write_tokens(np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int32) % CODES)
    start = 0
    for batch in batches:
        rows = np.array(batch, np.int32)
        run_step(engine, rows, rows, rows, rows[:0], start, start + len(rows))
        start += len(rows)
    return {name: buffer[:, :, :start].copy() for name, buffer in buffers(engine).items()}


def test_rows_do_not_depend_on_how_steps_were_batched(bundle: Bundle) -> None:
    """Products of other widths differ in their last bit, which may carry a row to the next integer."""
    together = rows_in(portable(bundle, 40), [list(range(8))])
    alone = rows_in(portable(bundle, 40), [[position] for position in range(8)])
    for name, buffer in together.items():
        assert buffer.dtype == np.int8
        assert len(np.unique(buffer)) > 20
        difference = np.abs(buffer.astype(np.int16) - alone[name])
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.005


def test_graphs_are_valid_and_read_integers(bundle: Bundle) -> None:
    for graph in {graph.file: graph for graph in bundle.manifest.graphs}.values():
        onnx.checker.check_model(str(bundle.file(graph.file)))
    graph = load_graph(bundle.file(bundle.manifest.graph(Form.PORTABLE).file))
    kinds = {
        value.name: value.type.tensor_type.elem_type for value in (*graph.graph.input, *graph.graph.output)
    }
    cached = {name for name in kinds if name.startswith(("past_", "new_"))}
    assert len(cached) == 8
    assert {kinds[name] for name in cached} == {onnx.TensorProto.INT8}
    assert graph.opset_import[0].version == 21


def statistics(absmax: np.ndarray) -> InputStatistics:
    seen = InputStatistics.empty(absmax.size)
    seen.add("rows", absmax.reshape(1, -1), seed=0)
    return seen


def test_scales_hold_keys_at_any_angle(bundle: Bundle) -> None:
    manifest, random = bundle.manifest, np.random.default_rng(0)
    shape = (manifest.cache.kv_heads, manifest.cache.head_size)
    reach = {name: random.uniform(0, 2, shape).astype(np.float32) for name in cache_rows_of(bundle)}
    seen = {name: statistics(values) for name, values in reach.items()}
    rotary = RotaryContext(frames=4, positions=9, frame_angles=(0.0,))
    turned = row_scales(seen, manifest.model_copy(update={"context": rotary}))
    plain = row_scales(seen, manifest.model_copy(update={"context": AbsoluteContext(frames=4)}))
    half = shape[1] // 2
    for name, values in reach.items():
        np.testing.assert_allclose(
            127 * plain[name], HEADROOM * np.maximum(values, 127 / HEADROOM / 2**14), rtol=1e-6
        )
        if name.startswith("value"):
            np.testing.assert_array_equal(turned[name], plain[name])
            continue
        np.testing.assert_array_equal(turned[name][:, :half], turned[name][:, half:])
        circle = np.hypot(values[:, :half], values[:, half:])
        np.testing.assert_allclose(127 * turned[name][:, :half], HEADROOM * circle, rtol=1e-6)


def cache_rows_of(bundle: Bundle) -> list[str]:
    return cache_tensors(bundle.manifest.cache.layers)


def test_the_report_counts_bytes_and_noise(bundle: Bundle) -> None:
    manifest = bundle.manifest
    width = manifest.cache.kv_heads * manifest.cache.head_size
    seen = {}
    for name in cache_rows_of(bundle):
        seen[name] = InputStatistics.empty(width)
        rows = np.random.default_rng(0).normal(size=(200, width)).astype(np.float32)
        seen[name].add(name, rows, seed=0)
    described = describe_cache(row_scales(seen, manifest), seen, manifest, "int8")
    assert described.bytes_before == 4 * described.bytes_after == 4 * 4 * width
    assert all(34 < ratio < 46 for ratio in described.signal_to_noise.values())


@given(seed=st.integers(0, 1000))
def test_integer_keys_are_turned_and_rounded(seed: int) -> None:
    random = np.random.default_rng(seed)
    keys = random.integers(-90, 91, (1, 2, 5, 16), np.int8)
    angles = random.uniform(-3, 3, 8)
    turned = keys.copy()
    rotate_pairs(turned, angles)
    pairs = (keys[..., :8].astype(np.float64) + 1j * keys[..., 8:]) * np.exp(1j * angles)
    exact = np.clip(np.concatenate([pairs.real, pairs.imag], axis=-1), -127, 127)
    assert np.abs(turned - exact).max() <= 0.5 + 1e-4


def test_forms_are_what_they_were(bundle: Bundle) -> None:
    kinds = {graph.form: bundle.manifest.cache_dtype(graph) for graph in bundle.manifest.graphs}
    assert kinds == {Form.PREFIX: np.float32, Form.PORTABLE: np.int8}
