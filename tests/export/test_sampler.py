from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diagd.export.sampler import GraphSampler
from diagd.export.tracing import link_weights, trace
from diagd.runtime.random import uniforms
from diagd.runtime.sampling import SamplingSettings, sample
from tests.runtime.sampling_reference import draw, kept_probabilities, rows

WIDTH, IDS = 64, 193
NAMES = ["logits", "uniforms", "temperature", "top_k", "top_p", "low", "high"]
FORBIDDEN = {"Loop", "If", "Scan", "TopK", "NonZero", "RandomUniform", "RandomUniformLike", "Multinomial"}
TEMPERATURES = st.sampled_from([0.3, 0.9, 1.0, 2.5])
TOP_K = st.sampled_from([0, 1, 2, 7, 50, 192, 193, 1000])

Run = Callable[..., np.ndarray]


@pytest.fixture(scope="module", params=[(True, 24), (False, 23)], ids=["keep-opset24", "drop-opset23"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Run]:
    keep_crossing, opset = request.param
    with torch.device("meta"):
        # A tensor given twice would become one graph input.
        sizes = [(WIDTH, IDS), (WIDTH,), (), (), (), (WIDTH,), (WIDTH,)]
        whole = {"top_k", "low", "high"}
        inputs = tuple(
            torch.zeros(size, dtype=torch.int32 if name in whole else torch.float32)
            for name, size in zip(NAMES, sizes, strict=True)
        )
    model = trace(
        GraphSampler(keep_crossing=keep_crossing),
        inputs,
        input_names=NAMES,
        output_names=["tokens"],
        opset=opset,
    )
    link_weights(model, {})
    assert not FORBIDDEN & {node.op_type for node in model.graph}
    path = tmp_path_factory.mktemp("sampler") / Path(f"{opset}.onnx")
    ir.save(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(
        logits: np.ndarray,
        numbers: np.ndarray,
        chosen: SamplingSettings,
        low: np.ndarray | int = 0,
        high: np.ndarray | int = IDS,
    ) -> np.ndarray:
        values = {
            "logits": np.ascontiguousarray(logits),
            "uniforms": numbers,
            "temperature": np.array(chosen.temperature, np.float32),
            "top_k": np.array(chosen.top_k, np.int32),
            "top_p": np.array(chosen.top_p, np.float32),
            "low": np.broadcast_to(np.asarray(low, np.int32), WIDTH).copy(),
            "high": np.broadcast_to(np.asarray(high, np.int32), WIDTH).copy(),
        }
        (tokens,) = session.run(None, values)
        return np.asarray(tokens)

    return keep_crossing, run


@settings(max_examples=80, deadline=None)
@given(rows(2, IDS), TEMPERATURES, TOP_K, st.floats(0.01, 1.0), st.booleans())
def test_kept_set_matches_the_sorted_reference(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, keep_crossing: bool
) -> None:
    weights = GraphSampler(keep_crossing=keep_crossing).kept_weights(
        torch.from_numpy(logits), torch.tensor(temperature), torch.tensor(top_k), torch.tensor(top_p)
    )
    for row, weight in zip(logits, weights.numpy(), strict=True):
        expected, margin = kept_probabilities(row, temperature, top_k, top_p, keep_crossing)
        if margin < 1e-6:
            continue
        assert (weight > 0)[expected > 1e-30].all()
        assert not weight[expected == 0].any()
        np.testing.assert_allclose(weight / weight.sum(), expected, rtol=2e-4, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    rows(4, IDS),
    st.builds(SamplingSettings, temperature=TEMPERATURES, top_k=TOP_K, top_p=st.floats(0.05, 1.0)),
    st.integers(0, 2**40),
)
def test_host_and_graph_draw_the_same_tokens(
    graph: tuple[bool, Run], logits: np.ndarray, chosen: SamplingSettings, position: int
) -> None:
    keep_crossing, run = graph
    batch = np.tile(logits, (WIDTH // 4, 1))
    numbers = uniforms(9, position + np.arange(WIDTH))
    low = np.arange(WIDTH) % 3
    high = IDS - np.arange(WIDTH) % 5
    host = sample(
        batch,
        numbers,
        chosen,
        low=low.astype(np.int32),
        high=high.astype(np.int32),
        keep_crossing=keep_crossing,
    )
    device = run(batch, numbers, chosen, low, high)
    assert device.dtype == np.int32
    for i in np.flatnonzero(host != device):
        row = np.full(IDS, -np.inf)
        row[low[i] : high[i]] = batch[i, low[i] : high[i]]
        expected, near = kept_probabilities(
            row, chosen.temperature, chosen.top_k, chosen.top_p, keep_crossing
        )
        _, margin = draw(expected, float(numbers[i]))
        assert min(near, margin) < 1e-6, f"row {i}: host {host[i]}, graph {device[i]}"


def test_greedy_takes_the_lowest_id_of_the_largest_logit(graph: tuple[bool, Run]) -> None:
    logits = np.random.default_rng(0).integers(-3, 4, (WIDTH, IDS)).astype(np.float32)
    numbers = uniforms(0, np.arange(WIDTH))
    greedy = SamplingSettings(temperature=0, top_k=3, top_p=0.5)
    assert np.array_equal(graph[1](logits, numbers, greedy), logits.argmax(axis=1))
    assert np.array_equal(graph[1](logits, numbers, greedy, low=10), 10 + logits[:, 10:].argmax(axis=1))


def test_extreme_uniforms_stay_inside_the_kept_ids(graph: tuple[bool, Run]) -> None:
    logits = np.full((WIDTH, IDS), -np.inf, np.float32)
    logits[:, 100:190] = np.random.default_rng(1).random((WIDTH, 90))
    numbers = np.where(np.arange(WIDTH) % 2, 2.0**-24, 1 - 2.0**-24).astype(np.float32)
    tokens = graph[1](logits, numbers, SamplingSettings())
    assert set(tokens[1::2]) == {100}
    assert set(tokens[0::2]) == {189}


def test_a_row_without_finite_logits_still_names_an_id(graph: tuple[bool, Run]) -> None:
    logits = np.zeros((WIDTH, IDS), np.float32)
    logits[1] = np.nan
    logits[2] = -np.inf
    tokens = graph[1](logits, uniforms(1, np.arange(WIDTH)), SamplingSettings(top_p=0.9), low=3, high=3)
    assert ((tokens >= 0) & (tokens < IDS)).all()


def test_twenty_thousand_draws_follow_the_exact_distribution(graph: tuple[bool, Run]) -> None:
    keep_crossing, run = graph
    row = (np.random.default_rng(3).standard_normal(IDS) * 1.5).astype(np.float32)
    chosen = SamplingSettings(0.9, 60, 0.9)
    numbers = uniforms(13, np.arange(20_032)).reshape(-1, WIDTH)
    batch = np.tile(row, (WIDTH, 1))
    tokens = np.concatenate([run(batch, number, chosen) for number in numbers])
    expected, _ = kept_probabilities(row, chosen.temperature, chosen.top_k, chosen.top_p, keep_crossing)
    observed = np.bincount(tokens, minlength=IDS)
    kept = expected > 0
    assert not observed[~kept].any()
    assert (expected[kept] * tokens.size).min() > 5
    assert stats.chisquare(observed[kept], expected[kept] * tokens.size).pvalue > 1e-3
