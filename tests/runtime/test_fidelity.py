"""The ONNX runtime against full recomputation in PyTorch: greedy tokens identical, logits within 1e-4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import diagd
from diagd.engines.engine import Float
from diagd.export.transformer import Transformer
from diagd.runtime.decoders import ScheduledDecoder
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import NO_SINK, RowSeed, Schedule, StreamLayout
from tests.models import PREFIX_TOKEN, export_small
from tests.oracles.full_recompute import FullRecompute, lengthened
from tests.oracles.models import CODES, random_stream, small_model
from tests.oracles.rows import rows_of

GREEDY = SamplingSettings(temperature=0.0)
LAYOUTS = {
    "actions after": StreamLayout(3, 5, after=2),
    "actions before": StreamLayout(4, 4, before=1),
    "no actions": StreamLayout(3, 4, prefix=1),
}


@dataclass
class Case:
    model: Transformer
    bundle: Path


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = small_model(LAYOUTS[request.param], context_frames=4)
    return Case(model, export_small(model, tmp_path_factory.mktemp("bundle") / "small.diagd"))


def compare(case: Case, schedule: Schedule, frames: int, prompt: int, window: int | None) -> None:
    layout = schedule.layout
    stream = random_stream(layout, prompt + frames, prompt)
    stream[: layout.prefix] = PREFIX_TOKEN
    given = stream.copy()
    table = schedule.table(prompt, frames, 0)
    model = lengthened(case.model, prompt + frames)
    oracle = FullRecompute(model, sampled=range(CODES), window=window)
    expected = oracle.run(rows_of(table), stream)

    session = diagd.load(case.bundle, window=window, threads=1)
    session.start(frames_of(given, layout, 0, prompt), actions_of(given, layout, 0, prompt))
    actions = actions_of(given, layout, prompt, frames)
    logits: list[Float] = []
    decoded = np.zeros_like(stream)
    for step, result in session.steps(ScheduledDecoder(schedule), actions, count=frames, sampling=GREEDY):
        logits.extend(result.logits.copy())
        decoded[step.sinks[step.sinks != NO_SINK]] = result.tokens
    np.testing.assert_array_equal(
        frames_of(decoded, layout, prompt, frames), frames_of(stream, layout, prompt, frames)
    )
    cells = [int(sink) for sink in table.sinks if sink != NO_SINK]
    assert len(logits) == len(cells)
    for cell, row in zip(cells, logits, strict=True):
        torch.testing.assert_close(torch.tensor(row), expected[cell], rtol=1e-4, atol=1e-4)


def frames_of(stream: np.ndarray, layout: StreamLayout, first: int, count: int) -> np.ndarray:
    starts = [layout.first_cell(frame) for frame in range(first, first + count)]
    cells = np.stack([stream[start : start + layout.cells] for start in starts])
    return cells.reshape(count, layout.rows, layout.columns).astype(np.int32)


def actions_of(stream: np.ndarray, layout: StreamLayout, first: int, count: int) -> np.ndarray:
    rows = np.zeros((count, layout.gap), np.int32)
    for index in range(count):
        width = layout.gap if first + index else layout.before
        start = layout.first_cell(first + index)
        rows[index, layout.gap - width :] = stream[start - width : start]
    return rows


@pytest.mark.parametrize("refeed", [True, False])
@pytest.mark.parametrize("seed", RowSeed)
@pytest.mark.parametrize("lags", ["k1 serial", "k1 chained", "k2 between", "k3 chained"])
def test_diagonal_decoding_equals_recomputation(case: Case, lags: str, seed: RowSeed, refeed: bool) -> None:
    layout = case.model.config.layout
    k = int(lags[1])
    serial, chained = Schedule.serial(layout, k).d, Schedule.chained(layout, k).d
    d = {"serial": serial, "chained": chained, "between": (serial + chained) // 2}[lags[3:]]
    compare(case, Schedule(layout, k, d, seed, refeed), frames=2, prompt=2, window=None)


def test_next_token_prediction_equals_recomputation(case: Case) -> None:
    compare(case, Schedule.next_token(case.model.config.layout), frames=2, prompt=1, window=None)


@pytest.mark.parametrize("lags", ["serial", "chained"])
def test_a_sliding_window_equals_recomputation(case: Case, lags: str) -> None:
    """Twelve frames in a window of three: eviction, wrapping writes, and keys turned back."""
    layout = case.model.config.layout
    schedule = Schedule.chained(layout, 2) if lags == "chained" else Schedule.serial(layout, 1)
    compare(case, schedule, frames=12, prompt=1, window=3)
