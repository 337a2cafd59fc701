from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diagd.errors import EngineError, UsageError
from diagd.runtime import sampling
from diagd.runtime.random import uniforms
from diagd.runtime.sampling import SamplingSettings, sample
from tests.runtime.sampling_reference import draw, kept_probabilities, rows

IDS = 193
HALF = np.array([0.5], np.float32)


def kept_weights(logits: np.ndarray, chosen: SamplingSettings, *, keep_crossing: bool) -> np.ndarray:
    """Weights of all ids."""
    weights, cells = sampling.kept_weights(logits, chosen, keep_crossing=keep_crossing)
    if cells is None:
        assert not weights[:, logits.shape[1] :].any()
        return weights[:, : logits.shape[1]]
    dense = np.zeros_like(logits)
    dense[cells] = weights
    return dense


def settings_of(values: st.SearchStrategy[float]) -> st.SearchStrategy[SamplingSettings]:
    return st.builds(
        SamplingSettings,
        temperature=st.sampled_from([0.3, 0.9, 1.0, 2.5]),
        top_k=st.sampled_from([0, 1, 2, 7, 50, 192, 193, 1000]),
        top_p=values,
    )


@settings(max_examples=120, deadline=None)
@given(rows(2, IDS), settings_of(st.floats(0.01, 1.0)), st.booleans())
def test_kept_set_and_weights_match_the_sorted_reference(
    logits: np.ndarray, chosen: SamplingSettings, keep_crossing: bool
) -> None:
    weights = kept_weights(logits, chosen, keep_crossing=keep_crossing)
    for row, weight in zip(logits, weights, strict=True):
        expected, margin = kept_probabilities(
            row, chosen.temperature, chosen.top_k, chosen.top_p, keep_crossing
        )
        if margin < 1e-6:
            continue
        representable = expected > 1e-30
        assert np.array_equal(weight[representable] > 0, np.full(representable.sum(), True))
        assert not weight[expected == 0].any()
        np.testing.assert_allclose(weight / weight.sum(), expected, rtol=2e-4, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(rows(3, IDS), settings_of(st.floats(0.05, 1.0)), st.booleans(), st.integers(0, 2**40))
def test_draw_is_the_inverse_cdf_in_order_of_id(
    logits: np.ndarray, chosen: SamplingSettings, keep_crossing: bool, position: int
) -> None:
    numbers = uniforms(5, position + np.arange(3))
    tokens = sample(logits, numbers, chosen, keep_crossing=keep_crossing)
    assert tokens.dtype == np.int32
    for row, number, token in zip(logits, numbers, tokens, strict=True):
        expected, near = kept_probabilities(
            row, chosen.temperature, chosen.top_k, chosen.top_p, keep_crossing
        )
        answer, margin = draw(expected, float(number))
        if near > 1e-6 and margin > 1e-6:
            assert token == answer


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("chosen", [SamplingSettings(top_p=0.8), SamplingSettings(1.3, 300, 0.95)], ids=str)
def test_a_full_vocabulary(spread: float, chosen: SamplingSettings) -> None:
    row = (np.random.default_rng(1).standard_normal(8262) * spread).astype(np.float32)
    for keep_crossing in (True, False):
        expected, margin = kept_probabilities(
            row, chosen.temperature, chosen.top_k, chosen.top_p, keep_crossing
        )
        assert margin > 1e-6
        weights = kept_weights(row[None], chosen, keep_crossing=keep_crossing)[0]
        assert np.array_equal(weights > 0, expected > 0)


@pytest.mark.parametrize(
    "chosen", [SamplingSettings(), SamplingSettings(top_p=0.8), SamplingSettings(0.7, 600, 0.9)], ids=str
)
@pytest.mark.parametrize("spreads", [[0.3, 9.0, 2.0, 0.0], [9.0, 12.0, 9.0, 15.0]], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(spreads: list[float], chosen: SamplingSettings) -> None:
    random = np.random.default_rng(2)
    logits = np.stack([random.standard_normal(8262) * spread for spread in spreads]).astype(np.float32)
    for position in range(20):
        numbers = uniforms(7, position + np.arange(4))
        together = sample(logits, numbers, chosen)
        apart = [sample(logits[row : row + 1], numbers[row : row + 1], chosen)[0] for row in range(4)]
        assert together.tolist() == apart
        if chosen.top_p < 1:
            expected, _ = kept_probabilities(
                logits[0], chosen.temperature, chosen.top_k, chosen.top_p, keep_crossing=True
            )
            assert expected[together[0]] > 0


def test_crossing_token_is_kept_or_dropped() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    chosen = SamplingSettings(top_p=0.6)
    assert np.flatnonzero(kept_weights(logits, chosen, keep_crossing=True)[0]).tolist() == [0, 1]
    assert np.flatnonzero(kept_weights(logits, chosen, keep_crossing=False)[0]).tolist() == [0]


def test_the_most_probable_ids_survive_any_top_p() -> None:
    logits = np.array([[0.0, 3.0, 3.0, 1.0]], np.float32)
    for keep_crossing in (True, False):
        weights = kept_weights(logits, SamplingSettings(top_p=1e-9), keep_crossing=keep_crossing)
        assert np.flatnonzero(weights[0]).tolist() == [1, 2]


def test_top_k_keeps_ties_at_the_last_place() -> None:
    logits = np.array([[1.0, 5.0, 3.0, 3.0, 3.0, 0.0]], np.float32)
    weights = kept_weights(logits, SamplingSettings(top_k=2), keep_crossing=True)
    assert np.flatnonzero(weights[0]).tolist() == [1, 2, 3, 4]


def test_logits_that_differ_by_one_bit_are_not_tied() -> None:
    logits = np.array([[10.0, 1e-9, 2e-9]], np.float32)
    weights = kept_weights(logits, SamplingSettings(top_k=2), keep_crossing=True)
    assert np.flatnonzero(weights[0]).tolist() == [0, 2]


def test_top_p_counts_what_top_k_left() -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    weights = kept_weights(logits, SamplingSettings(top_k=2, top_p=0.5), keep_crossing=True)
    assert np.flatnonzero(weights[0]).tolist() == [0]  # 0.4 of 0.7 is over one half, 0.4 of 1 is not


def test_temperature_zero_is_the_lowest_id_of_the_largest_logit() -> None:
    logits = np.array([[1.0, 7.0, 7.0], [2.0, 2.0, -1.0]], np.float32)
    greedy = SamplingSettings(temperature=0, top_k=1, top_p=0.1)
    assert sample(logits, np.full(2, 0.99, np.float32), greedy).tolist() == [1, 0]


def test_ranges_apply_before_top_k_and_top_p() -> None:
    logits = np.tile(np.log(np.array([0.9, 0.05, 0.03, 0.02], np.float32)), (3, 1))
    low, high = np.array([1, 0, 2], np.int32), np.array([3, 4, 4], np.int32)
    chosen = SamplingSettings(top_p=0.7)  # the first row: 0.05 of 0.08 is under 0.7, so both of its ids stay
    tokens = [
        sample(logits, np.full(3, number, np.float32), chosen, low=low, high=high).tolist()
        for number in (0.01, 0.62, 0.64, 0.99)
    ]
    assert tokens == [[1, 0, 2], [1, 0, 3], [2, 0, 3], [2, 0, 3]]
    assert sample(logits, np.full(3, 0.5), SamplingSettings(temperature=0), low=low, high=high).tolist() == [
        1,
        0,
        2,
    ]


def test_extreme_uniforms_stay_inside_the_kept_ids() -> None:
    logits = np.full((2, 300), -np.inf, np.float32)
    logits[:, 100:200] = 0
    numbers = np.array([2.0**-24, 1 - 2.0**-24], np.float32)
    assert sample(logits, numbers, SamplingSettings()).tolist() == [100, 199]


@pytest.mark.parametrize("chosen", [SamplingSettings(), SamplingSettings(0.8, 40, 0.9)], ids=str)
def test_twenty_thousand_draws_follow_the_exact_distribution(chosen: SamplingSettings) -> None:
    row = (np.random.default_rng(3).standard_normal(64) * 1.5).astype(np.float32)
    numbers = uniforms(11, np.arange(20_000))
    tokens = sample(np.broadcast_to(row, (numbers.size, row.size)), numbers, chosen)
    expected, _ = kept_probabilities(row, chosen.temperature, chosen.top_k, chosen.top_p, True)
    observed = np.bincount(tokens, minlength=row.size)
    assert not observed[expected == 0].any()
    likely = expected * numbers.size >= 5
    rest = [observed[~likely].sum()], [expected[~likely].sum() * numbers.size]
    counts = np.concatenate([observed[likely], rest[0]])
    means = np.concatenate([expected[likely] * numbers.size, rest[1]])
    full = means > 0
    assert stats.chisquare(counts[full], means[full]).pvalue > 1e-3


def test_no_rows() -> None:
    assert sample(np.empty((0, 4), np.float32), np.empty(0, np.float32), SamplingSettings()).shape == (0,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected 0 .greedy. or"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"top_k": -3}, "top-k is -3"),
        ({"top_k": 1.5}, "top-k is 1.5"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.2}, "at most 1"),
    ],
)
def test_bad_settings(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplingSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(poison: float, temperature: float) -> None:
    logits = np.zeros((2, 5), np.float32)
    logits[1, 3] = poison
    with pytest.raises(EngineError, match="row 1"):
        sample(logits, np.full(2, 0.5), SamplingSettings(temperature=temperature))


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (2, 2), (0, 6)])
def test_bad_ranges(low: int, high: int) -> None:
    with pytest.raises(UsageError, match="expected 0 <= low < high <= 5"):
        sample(
            np.zeros((1, 5), np.float32), HALF, SamplingSettings(), low=np.array([low]), high=np.array([high])
        )
