"""The forms of fixed capacity against full recomputation in PyTorch: greedy tokens identical."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from diagd.bundle import Bundle, Form
from diagd.engines.engine import Engine, SamplingState, StepInputs
from diagd.engines.fixed import FixedEngine
from diagd.engines.modern import ModernEngine
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.portable import PortableEngine
from diagd.engines.prefix import PrefixEngine
from diagd.errors import BundleError, UsageError
from diagd.export.exporter import GraphOptions
from diagd.export.transformer import Transformer
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import RowSeed, Schedule, StreamLayout
from tests.engines.fidelity import Run, decode, recompute
from tests.models import export_small
from tests.oracles.models import small_model

LAYOUT = StreamLayout(3, 5, after=2)
CPU = CpuOptions(threads=1, prepack=False)
ENGINES = {"modern": ModernEngine, "portable": PortableEngine}


@dataclass
class Case:
    model: Transformer
    bundle: Bundle
    expected: dict[Run, np.ndarray] = field(default_factory=dict)

    def recomputed(self, run: Run) -> np.ndarray:
        """Frames by the oracle, computed once for all engines."""
        if run not in self.expected:
            self.expected[run] = recompute(self.model, run)
        return self.expected[run]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = small_model(LAYOUT, context_frames=4)
    path = tmp_path_factory.mktemp("bundle") / "small.diagd"
    forms = (Form.PREFIX, Form.MODERN, Form.PORTABLE)
    return Case(model, Bundle.open(export_small(model, path, GraphOptions(forms, widths=(1, 4, 16)))))


@pytest.fixture(params=ENGINES, ids=str)
def engine_type(request: pytest.FixtureRequest) -> type[FixedEngine]:
    return ENGINES[request.param]


def compare(case: Case, engine_type: type[FixedEngine], run: Run) -> None:
    def make(bundle: Bundle, tokens: int) -> Engine:
        return engine_type(bundle, tokens, CPU)

    np.testing.assert_array_equal(decode(case.bundle, make, run), case.recomputed(run))


def test_next_token_prediction_equals_recomputation(case: Case, engine_type: type[FixedEngine]) -> None:
    compare(case, engine_type, Run(Schedule.next_token(LAYOUT), frames=1, prompt=1))


@pytest.mark.parametrize(
    ("lags", "seed"),
    [
        ("k1 serial", RowSeed.DUPLICATE),
        ("k1 chained", RowSeed.PREVIOUS_FRAME),
        ("k2 chained", RowSeed.ABOVE),
    ],
)
def test_diagonal_decoding_equals_recomputation(
    case: Case, engine_type: type[FixedEngine], lags: str, seed: RowSeed
) -> None:
    k = int(lags[1])
    d = Schedule.serial(LAYOUT, k).d if lags.endswith("serial") else Schedule.chained(LAYOUT, k).d
    compare(case, engine_type, Run(Schedule(LAYOUT, k, d, seed), prompt=1))


@pytest.mark.parametrize("lags", ["serial", "chained"])
def test_a_sliding_window_equals_recomputation(case: Case, engine_type: type[FixedEngine], lags: str) -> None:
    """Eviction, wrapping writes over stale rows, keys turned back."""
    schedule = Schedule.chained(LAYOUT, 2) if lags == "chained" else Schedule.serial(LAYOUT, 1)
    compare(case, engine_type, Run(schedule, frames=11, prompt=1, window=2 if lags == "serial" else 3))


@pytest.mark.parametrize(
    "sampling", [SamplingSettings(1.0, 0, 1.0), SamplingSettings(0.8, 5, 1.0), SamplingSettings(1.2, 0, 0.7)]
)
def test_widths_and_the_sampler_in_the_graph_draw_what_the_host_draws(
    case: Case, engine_type: type[FixedEngine], sampling: SamplingSettings
) -> None:
    run = Run(Schedule.chained(LAYOUT, 1), sampling=sampling, seed=7)

    def host(bundle: Bundle, tokens: int) -> Engine:
        return PrefixEngine(bundle, 512, tokens, CPU)

    def narrow(bundle: Bundle, tokens: int) -> Engine:
        return engine_type(bundle, tokens, CPU)

    def wide(bundle: Bundle, tokens: int) -> Engine:
        engine = engine_type(bundle, tokens, CPU)
        engine.widths = (16,)
        return engine

    expected = decode(case.bundle, host, run)
    np.testing.assert_array_equal(decode(case.bundle, narrow, run), expected)
    np.testing.assert_array_equal(decode(case.bundle, wide, run), expected)


def test_a_step_writes_its_slots_and_no_other(case: Case, engine_type: type[FixedEngine]) -> None:
    engine = engine_type(case.bundle, 80, CPU)
    addresses = {name: buffer.ctypes.data for name, buffer in engine.buffers.items()}
    for buffer in engine.buffers.values():
        buffer[:] = 0.25
    engine.slot_position[8:10] = 3, 4
    rows = np.array([3, 4], np.int32)
    inputs = StepInputs(rows, rows, rows + 1, np.array([1], np.int32), np.array([0.5], np.float32), 8, 10)
    logits = engine.step(inputs, SamplingState(0.0, 0, 1.0))
    assert logits.shape == (1, case.bundle.manifest.output_vocabulary)
    written = slice(8, 8 + engine.padded_width(2))
    for name, buffer in engine.buffers.items():
        assert buffer.ctypes.data == addresses[name]
        assert (buffer[:, :, written] != 0.25).all()
        outside = np.delete(buffer, np.arange(engine.capacity)[written], axis=2)
        assert (outside == 0.25).all()
    assert engine.token_buffer[5] == logits[0, :24].argmax()
    np.testing.assert_array_equal(np.flatnonzero(np.delete(engine.token_buffer[:-1], 5)), [])


def test_pad_rows_never_become_nan(case: Case, engine_type: type[FixedEngine]) -> None:
    """One real row in a width of four: the pads' rows stay in the buffers until something covers them."""
    engine = engine_type(case.bundle, 80, CPU)
    engine.widths = (4,)
    engine.slot_position[0] = 30
    row = np.array([30], np.int32)
    inputs = StepInputs(row, row, row + 1, np.array([0], np.int32), np.array([0.5], np.float32), 0, 1)
    assert np.isfinite(engine.step(inputs, SamplingState(1.0, 0, 1.0))).all()
    assert all(np.isfinite(buffer).all() for buffer in engine.buffers.values())


def test_steps_wider_than_every_graph_are_refused(case: Case, engine_type: type[FixedEngine]) -> None:
    def make(bundle: Bundle, tokens: int) -> Engine:
        engine = engine_type(bundle, tokens, CPU)
        engine.max_width = 2
        return engine

    with pytest.raises(UsageError, match=r"k=1, d=3 feeds \d tokens, .* take up to 2; .* --set widths="):
        decode(case.bundle, make, Run(Schedule.chained(LAYOUT, 1), frames=2))


def test_one_graph_file_serves_every_width(case: Case) -> None:
    graphs = [graph for graph in case.bundle.manifest.graphs if graph.form is Form.MODERN]
    assert [graph.width for graph in graphs] == [1, 4, 16]
    assert len({graph.file for graph in graphs}) == 1
    session = onnxruntime.InferenceSession(str(case.bundle.file(graphs[0].file)))
    inputs = {value.name: value.shape for value in session.get_inputs()}
    assert inputs["past_key_0"] == [1, 2, graphs[0].capacity, 8]
    assert isinstance(inputs["sources"][0], str)


def test_a_bundle_without_the_form_says_how_to_get_it(tmp_path: Path) -> None:
    model = small_model(LAYOUT, layers=1, context_frames=4)
    bundle = Bundle.open(export_small(model, tmp_path / "prefix.diagd"))
    with pytest.raises(BundleError, match="no modern graph; export it again with --form modern"):
        ModernEngine(bundle, 80, CPU)
