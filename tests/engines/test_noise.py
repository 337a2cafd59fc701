from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diagd.engines.noise import KEPT_IDS, _exponential, check_seed, noise, noise_rows, philox
from diagd.errors import UsageError

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
    assert stats.kstest(made, "expon").pvalue > 1e-3
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
