from __future__ import annotations

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from diagd.engines import sampler
from diagd.engines.engine import SamplingState
from diagd.engines.sampler import (
    KEPT_IDS,
    UNIT,
    _exponential,
    check_seed,
    noise,
    noise_rows,
    philox,
    sample,
)
from diagd.errors import EngineError, UsageError
from tests.engines.sampling_reference import draw, kept_probabilities, rows

IDS = 193
ONE = SamplingState(1.0)
HERE = np.zeros(1, np.int64)
ALL_ONES = 0xFFFFFFFF
# Known answers of Random123's kat_vectors for philox4x32, 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def kept_ids(
    logits: np.ndarray, chosen: SamplingState, *, keep_crossing: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of all ids, and which of them are kept; the weights of others are 0."""
    weights, kept = sampler.kept_weights(logits, logits.max(axis=1), chosen, keep_crossing)
    return weights * kept, kept


def kept_weights(logits: np.ndarray, chosen: SamplingState, *, keep_crossing: bool) -> np.ndarray:
    return kept_ids(logits, chosen, keep_crossing=keep_crossing)[0]


def settings_of(values: st.SearchStrategy[float]) -> st.SearchStrategy[SamplingState]:
    return st.builds(
        SamplingState,
        temperature=st.sampled_from([0.3, 0.9, 1.0, 2.5]),
        top_k=st.sampled_from([0, 1, 2, 7, 50, 192, 193, 1000]),
        top_p=values,
    )


@settings(max_examples=120)
@given(rows(2, IDS), settings_of(st.floats(0.01, 1.0)), st.booleans())
def test_kept_set_and_weights_match_the_sorted_reference(
    logits: np.ndarray, chosen: SamplingState, keep_crossing: bool
) -> None:
    weights, kept = kept_ids(logits, chosen, keep_crossing=keep_crossing)
    for row, weight, stays in zip(logits, weights, kept, strict=True):
        expected, margin = kept_probabilities(
            row, chosen.temperature, chosen.top_k, chosen.top_p, keep_crossing
        )
        if margin < 1e-6:
            continue
        assert stays[expected > 1e-30].all()
        assert not weight[expected == 0].any()
        assert (weight / UNIT % 1 == 0).all()
        np.testing.assert_allclose(weight, expected / expected.max(), rtol=1e-5, atol=UNIT / 2)


@settings(max_examples=60)
@given(rows(3, IDS), settings_of(st.floats(0.05, 1.0)), st.booleans(), st.integers(0, 2**40))
def test_the_draw_is_a_race_of_the_kept_ids(
    logits: np.ndarray, chosen: SamplingState, keep_crossing: bool, position: int
) -> None:
    positions = position + np.arange(3)
    tokens = sample(logits, positions, chosen, keep_crossing=keep_crossing)
    assert tokens.dtype == np.int32
    for row, place, token in zip(logits, positions, tokens, strict=True):
        expected, near = kept_probabilities(
            row, chosen.temperature, chosen.top_k, chosen.top_p, keep_crossing
        )
        answer, margin = draw(expected, noise(chosen.seed, np.full(IDS, place), np.arange(IDS)))
        if near > 1e-6 and margin > 1e-6:
            assert token == answer


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("chosen", [SamplingState(1.0, top_p=0.8), SamplingState(1.3, 300, 0.95)], ids=str)
def test_a_full_vocabulary(spread: float, chosen: SamplingState) -> None:
    row = (np.random.default_rng(1).standard_normal(8262) * spread).astype(np.float32)
    for keep_crossing in (True, False):
        expected, margin = kept_probabilities(
            row, chosen.temperature, chosen.top_k, chosen.top_p, keep_crossing
        )
        assert margin > 1e-6
        weights = kept_weights(row[None], chosen, keep_crossing=keep_crossing)[0]
        assert np.array_equal(weights > 0, expected > 0)


@pytest.mark.parametrize(
    "chosen", [SamplingState(1.0), SamplingState(1.0, top_p=0.8), SamplingState(0.7, 600, 0.9)], ids=str
)
@pytest.mark.parametrize("spreads", [[0.3, 9.0, 2.0, 0.0], [9.0, 12.0, 9.0, 15.0]], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(spreads: list[float], chosen: SamplingState) -> None:
    random = np.random.default_rng(2)
    logits = np.stack([random.standard_normal(8262) * spread for spread in spreads]).astype(np.float32)
    for position in range(20):
        places = position + np.arange(4)
        together = sample(logits, places, chosen)
        apart = [sample(logits[row : row + 1], places[row : row + 1], chosen)[0] for row in range(4)]
        assert together.tolist() == apart
        if chosen.top_p < 1:
            expected, _ = kept_probabilities(
                logits[0], chosen.temperature, chosen.top_k, chosen.top_p, keep_crossing=True
            )
            assert expected[together[0]] > 0


def test_crossing_token_is_kept_or_dropped() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    chosen = SamplingState(1.0, top_p=0.6)
    assert np.flatnonzero(kept_weights(logits, chosen, keep_crossing=True)[0]).tolist() == [0, 1]
    assert np.flatnonzero(kept_weights(logits, chosen, keep_crossing=False)[0]).tolist() == [0]


def test_the_most_probable_ids_survive_any_top_p() -> None:
    logits = np.array([[0.0, 3.0, 3.0, 1.0]], np.float32)
    for keep_crossing in (True, False):
        weights = kept_weights(logits, SamplingState(1.0, top_p=1e-9), keep_crossing=keep_crossing)
        assert np.flatnonzero(weights[0]).tolist() == [1, 2]


def test_top_k_keeps_ties_at_the_last_place() -> None:
    logits = np.array([[1.0, 5.0, 3.0, 3.0, 3.0, 0.0]], np.float32)
    weights = kept_weights(logits, SamplingState(1.0, 2), keep_crossing=True)
    assert np.flatnonzero(weights[0]).tolist() == [1, 2, 3, 4]


def test_logits_that_differ_by_one_bit_are_not_tied() -> None:
    logits = np.array([[10.0, 1e-9, 2e-9]], np.float32)
    weights = kept_weights(logits, SamplingState(1.0, 2), keep_crossing=True)
    assert np.flatnonzero(weights[0]).tolist() == [0, 2]


def test_top_p_counts_what_top_k_left() -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    weights = kept_weights(logits, SamplingState(1.0, 2, 0.5), keep_crossing=True)
    assert np.flatnonzero(weights[0]).tolist() == [0]  # 0.4 of 0.7 is over one half, 0.4 of 1 is not


def test_temperature_zero_is_the_lowest_id_of_the_largest_logit() -> None:
    logits = np.array([[1.0, 7.0, 7.0], [2.0, 2.0, -1.0]], np.float32)
    greedy = SamplingState(temperature=0, top_k=1, top_p=0.1)
    assert sample(logits, np.arange(2), greedy).tolist() == [1, 0]


def test_ranges_apply_before_top_k_and_top_p() -> None:
    logits = np.tile(np.log(np.array([0.9, 0.05, 0.03, 0.02], np.float32)), (3, 1))
    low, high = np.array([1, 0, 2], np.int32), np.array([3, 4, 4], np.int32)
    chosen = SamplingState(1.0, top_p=0.7)  # first row: 0.05 of 0.08 is under 0.7, so both of its ids stay
    positions = np.arange(600).reshape(200, 3)
    tokens = np.array([sample(logits, at, chosen, low=low, high=high) for at in positions])
    assert [set(column) for column in tokens.T.tolist()] == [{1, 2}, {0}, {2, 3}]
    for column, ids in ((0, (1, 3)), (2, (2, 4))):
        inside = np.arange(*ids)
        shares = np.exp(logits[0, inside].astype(np.float64))
        for place, token in zip(positions[:, column], tokens[:, column], strict=True):
            assert token == inside[draw(shares, noise(0, np.full(len(inside), place), inside))[0]]
    greedy = sample(logits, np.arange(3), SamplingState(), low=low, high=high)
    assert greedy.tolist() == [1, 0, 2]


def test_noise_at_both_ends_stays_inside_the_kept_ids() -> None:
    logits = np.full((2000, 300), -np.inf, np.float32)
    logits[:, 100:200] = 0
    drawn = sample(logits, np.arange(2000), ONE)
    assert (drawn.min(), drawn.max()) == (100, 199)


def test_what_is_kept_and_drawn_does_not_depend_on_how_ids_are_numbered() -> None:
    """Weights are sums of whole units: whatever the order, they are the same, and so is the kept set."""
    random = np.random.default_rng(4)
    row = (random.standard_normal(3000) * 2).astype(np.float32)
    for chosen in (SamplingState(1.0, 0, 0.8), SamplingState(0.9, 500, 0.95)):
        weights = kept_weights(row[None], chosen, keep_crossing=True)[0]
        assert (weights / UNIT % 1 == 0).all()
        for _ in range(5):
            order = random.permutation(3000)
            shuffled = kept_weights(row[None, order], chosen, keep_crossing=True)[0]
            np.testing.assert_array_equal(shuffled, weights[order])


def test_laws_that_differ_a_little_mostly_draw_the_same_token() -> None:
    """Equal noise couples them; a walk along the cumulated probability gives 0.26 here."""
    random = np.random.default_rng(5)
    logits = (random.standard_normal((300, 8192)) * 2).astype(np.float32)
    other = logits + (0.2 * random.standard_normal(logits.shape)).astype(np.float32)
    chosen, places = SamplingState(1.0, 0, 0.8), np.arange(300)
    assert (sample(logits, places, chosen) == sample(other, places, chosen)).mean() > 0.75


def test_full_rows_and_few_ids_meet_the_same_noise() -> None:
    """Many ids: noise of all or of the kept ones; few ids: noise made for many positions at once."""
    random = np.random.default_rng(6)
    for ids in (100, 512, 513, 3000):
        logits = random.standard_normal((6, ids)).astype(np.float32)
        for top_p in (1.0, 0.02):
            state = SamplingState(1.0, 0, top_p, seed=9)
            drawn = sample(logits, np.arange(6) * 1000, state)
            for row in range(6):
                weights = kept_weights(logits[row : row + 1], state, keep_crossing=True)[0]
                made = noise(9, np.full(ids, 1000 * row), np.arange(ids))
                assert drawn[row] == (weights / made).argmax()


@pytest.mark.parametrize("chosen", [SamplingState(1.0, seed=11), SamplingState(0.8, 40, 0.9, 11)], ids=str)
def test_twenty_thousand_draws_follow_the_exact_distribution(chosen: SamplingState) -> None:
    row = (np.random.default_rng(3).standard_normal(64) * 1.5).astype(np.float32)
    tokens = sample(np.broadcast_to(row, (20_000, row.size)), np.arange(20_000), chosen)
    expected, _ = kept_probabilities(row, chosen.temperature, chosen.top_k, chosen.top_p, True)
    observed = np.bincount(tokens, minlength=row.size)
    assert not observed[expected == 0].any()
    likely = expected * tokens.size >= 5
    rest = [observed[~likely].sum()], [expected[~likely].sum() * tokens.size]
    counts = np.concatenate([observed[likely], rest[0]])
    means = np.concatenate([expected[likely] * tokens.size, rest[1]])
    full = means > 0
    assert scipy.stats.chisquare(counts[full], means[full]).pvalue > 1e-3


def test_no_rows() -> None:
    assert sample(np.empty((0, 4), np.float32), np.empty(0, np.int64), ONE).shape == (0,)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(poison: float, temperature: float) -> None:
    logits = np.zeros((2, 5), np.float32)
    logits[1, 3] = poison
    with pytest.raises(EngineError, match="row 1"):
        sample(logits, np.arange(2), SamplingState(temperature))
    logits[:, 3] = 3e38  # whose sum is not finite
    bounds = np.zeros(2, np.int32), np.full(2, 5, np.int32)
    found = sampler.draw_plain(logits, np.arange(2), SamplingState(temperature), *bounds, True)
    np.testing.assert_array_equal(found, 3)


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (2, 2), (0, 6)])
def test_bad_ranges(low: int, high: int) -> None:
    with pytest.raises(UsageError, match="expected 0 <= low < high <= 5"):
        sample(np.zeros((1, 5), np.float32), HERE, ONE, low=np.array([low]), high=np.array([high]))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert philox(np.array(counter, dtype=np.uint64), key[0] | key[1] << 32).tolist() == list(expected)


def test_the_words_of_a_block_are_those_of_four_ids() -> None:
    """Philox of counter (position, position >> 32, id / 4, 1) and key (seed, seed >> 32)."""
    position, seed = (3 << 32) + 7, (5 << 32) + 9
    words = philox(np.array([7, 3, 25, 1], np.uint64), seed).astype(np.float64)
    expected = -np.log1p(-(words + 0.5) / 2**32)
    made = noise(seed, np.full(4, position), np.arange(100, 104))
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected, rtol=1e-6)


def test_large_positions_and_seeds_use_all_their_bits() -> None:
    positions = np.array([5, 5 + (1 << 32), 5 + (1 << 40)])
    seeds = (3, 3 + (1 << 32), (1 << 64) - 1)
    made = np.concatenate([noise(seed, positions, np.full(3, 8)) for seed in seeds])
    assert len(set(made.tolist())) == made.size


@given(
    st.integers(0, (1 << 64) - 1),
    st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 200)), min_size=1, max_size=20, unique=True),
)
def test_a_number_depends_on_its_own_position_and_id_only(seed: int, cells: list[tuple[int, int]]) -> None:
    positions, ids = np.array(sorted(cells)).T
    together = noise(seed, positions, ids)
    assert together.tolist() == [
        noise(seed, positions[n : n + 1], ids[n : n + 1])[0] for n in range(len(ids))
    ]


@given(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 1 << 40),
    st.lists(st.integers(0, 10_000), min_size=1, max_size=5),
    st.sampled_from([1, 107, KEPT_IDS, KEPT_IDS + 2]),
)
@settings(max_examples=30)
def test_whole_rows_have_the_same_numbers(seed: int, start: int, offsets: list[int], ids: int) -> None:
    positions = start + np.array(offsets, np.int64)
    rows = noise_rows(seed, positions, ids)
    assert rows.dtype == np.float32
    for position, row in zip(positions, rows, strict=True):
        assert row.tolist() == noise(seed, np.full(ids, position), np.arange(ids)).tolist()


def test_numbers_of_other_seeds_are_others() -> None:
    seeds, positions, ids = (3, 3, (1 << 64) - 1, 3 + (1 << 32), 4), (7, 7, 7, 7, 9), (1, 2, 2, 2, 3)
    apart = [
        noise(seed, np.array([at]), np.array([n]))[0]
        for seed, at, n in zip(seeds, positions, ids, strict=True)
    ]
    assert len(set(apart)) == 5


def test_numbers_are_made_in_pieces_of_any_length() -> None:
    positions, ids = np.divmod(np.arange(30_000), 8192)
    part = noise(4, positions[9_000:9_100], ids[9_000:9_100])
    assert noise(4, positions, ids)[9_000:9_100].tolist() == part.tolist()


def test_numbers_are_exponential_and_independent() -> None:
    positions, ids = np.divmod(np.arange(200_000), 500)
    made = noise(7, positions, ids).astype(np.float64)
    assert made.min() > 0
    assert np.isfinite(made).all()
    assert scipy.stats.kstest(made, "expon").pvalue > 1e-3
    shares = np.exp(-made)
    assert abs(np.corrcoef(shares[:-1], shares[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(shares[:-500], shares[500:])[0, 1]) < 0.01
    assert abs(np.corrcoef(shares, np.exp(-noise(8, positions, ids).astype(np.float64)))[0, 1]) < 0.01


def test_the_ends_of_the_exponential_are_finite() -> None:
    words = np.array([0, 1, 1 << 31, (1 << 32) - 1], np.uint64)
    made = _exponential(words)
    np.testing.assert_allclose(made[:3], -np.log1p(-(words[:3] + 0.5) / 2**32), rtol=1e-6)
    assert 16 < made[3] < 23


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(UsageError, match="seed"):
        check_seed(seed)
