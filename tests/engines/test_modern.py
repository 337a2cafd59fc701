"""The forms of fixed capacity against full recomputation in PyTorch: greedy tokens identical."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from diagd.bundle import Bundle, Form
from diagd.engines.engine import Engine, SamplingState
from diagd.engines.executor import Executor
from diagd.errors import BundleError, EngineError, UsageError
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import RowSeed, Schedule, StreamLayout
from tests.engines.fidelity import Run, decode, recompute
from tests.engines.host_device import buffers
from tests.engines.opening import modern, openvino, portable, prefix, run_step
from tests.models import export_small
from tests.oracles.models import small_model

LAYOUT = StreamLayout(3, 5, after=2)
OpenEngine = Callable[[Bundle, int], Executor]
ENGINES = {"modern": modern, "portable": portable, "openvino": openvino}


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
def open_engine(request: pytest.FixtureRequest) -> OpenEngine:
    return ENGINES[request.param]


def compare(case: Case, open_engine: OpenEngine, run: Run) -> None:
    np.testing.assert_array_equal(decode(case.bundle, open_engine, run), case.recomputed(run))


def test_next_token_prediction_equals_recomputation(case: Case, open_engine: OpenEngine) -> None:
    compare(case, open_engine, Run(Schedule.next_token(LAYOUT), frames=1, prompt=1))


@pytest.mark.parametrize(
    ("lags", "seed"),
    [
        ("k1 serial", RowSeed.DUPLICATE),
        ("k1 chained", RowSeed.PREVIOUS_FRAME),
        ("k2 chained", RowSeed.ABOVE),
    ],
)
def test_diagonal_decoding_equals_recomputation(
    case: Case, open_engine: OpenEngine, lags: str, seed: RowSeed
) -> None:
    k = int(lags[1])
    d = Schedule.serial(LAYOUT, k).d if lags.endswith("serial") else Schedule.chained(LAYOUT, k).d
    compare(case, open_engine, Run(Schedule(LAYOUT, k, d, seed), prompt=1))


@pytest.mark.parametrize("lags", ["serial", "chained"])
def test_a_sliding_window_equals_recomputation(case: Case, open_engine: OpenEngine, lags: str) -> None:
    """Eviction, wrapping writes over stale rows, keys turned back."""
    schedule = Schedule.chained(LAYOUT, 2) if lags == "chained" else Schedule.serial(LAYOUT, 1)
    compare(case, open_engine, Run(schedule, frames=11, prompt=1, window=2 if lags == "serial" else 3))


@pytest.mark.parametrize(
    "sampling", [SamplingSettings(1.0, 0, 1.0), SamplingSettings(0.8, 5, 1.0), SamplingSettings(1.2, 0, 0.7)]
)
def test_all_forms_and_widths_draw_the_same_tokens(
    case: Case, open_engine: OpenEngine, sampling: SamplingSettings
) -> None:
    run = Run(Schedule.chained(LAYOUT, 1), sampling=sampling, seed=7)

    def wide(bundle: Bundle, tokens: int) -> Engine:
        engine = open_engine(bundle, tokens)
        engine.widths = (16,)
        return engine

    expected = decode(case.bundle, prefix, run)
    np.testing.assert_array_equal(decode(case.bundle, open_engine, run), expected)
    np.testing.assert_array_equal(decode(case.bundle, wide, run), expected)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model with weights that are infinite, whose logits are no numbers."""
    model = small_model(LAYOUT, layers=1, context_frames=4)
    with torch.no_grad():
        next(model.parameters()).view(-1)[:] = torch.inf
    forms = (Form.PREFIX, Form.MODERN, Form.PORTABLE)
    path = tmp_path_factory.mktemp("broken") / "broken.diagd"
    return Bundle.open(export_small(model, path, GraphOptions(forms, widths=(1, 16))))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("make", [prefix, modern, portable, openvino])
def test_logits_that_are_no_numbers_are_refused(
    broken: Bundle, make: Callable[[Bundle, int], Engine], temperature: float
) -> None:
    run = Run(Schedule.serial(LAYOUT, 1), sampling=SamplingSettings(temperature))
    with pytest.raises(EngineError, match="the largest logit of row 0 is nan; expected a finite number"):
        decode(broken, make, run)


def test_a_step_writes_its_slots_and_no_other(case: Case, open_engine: OpenEngine) -> None:
    engine = open_engine(case.bundle, 80)
    addresses = {name: tensor.address for name, tensor in engine.tensors.cache.items()}
    for buffer in buffers(engine).values():
        buffer[:] = 0.25
    rows = np.array([3, 4], np.int32)
    sinks = np.array([79, 5], np.int32)  # the first row decodes nothing: its prediction goes to scratch
    logits = run_step(engine, rows, rows, sinks, np.array([1], np.int32), 8, 10)
    assert logits.shape == (1, case.bundle.manifest.output_vocabulary)
    written = slice(8, 8 + int(engine.padded_widths(np.array([2], np.int32))[0]))
    for name, buffer in buffers(engine).items():
        assert engine.tensors.cache[name].address == addresses[name]
        assert (buffer[:, :, written] != 0.25).all()
        outside = np.delete(buffer, np.arange(engine.capacity)[written], axis=2)
        assert (outside == 0.25).all()
    tokens = engine.read_tokens(np.arange(79, dtype=np.int32))
    assert tokens[5] == logits[0, :24].argmax()
    np.testing.assert_array_equal(np.flatnonzero(np.delete(tokens, 5)), [])


def test_pad_rows_never_become_nan(case: Case, open_engine: OpenEngine) -> None:
    """One real row in a width of four: the pads' rows stay in the buffers until something covers them."""
    engine = open_engine(case.bundle, 80)
    engine.widths = (4,)
    row = np.array([30], np.int32)
    state = SamplingState(1.0)
    assert np.isfinite(
        run_step(engine, row, row, row + 1, np.array([0], np.int32), 0, 1, sampling=state)
    ).all()
    assert all(np.isfinite(buffer).all() for buffer in buffers(engine).values())


def test_steps_wider_than_every_graph_are_refused(case: Case, open_engine: OpenEngine) -> None:
    def make(bundle: Bundle, tokens: int) -> Engine:
        engine = open_engine(bundle, tokens)
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
        modern(bundle, 80)
