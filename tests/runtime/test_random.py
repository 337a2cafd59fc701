from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from diagd.errors import UsageError
from diagd.runtime.random import draws, philox, uniforms

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
    assert philox(np.array(counter, dtype=np.uint64), key).tolist() == list(expected)


def test_uniform_is_the_first_word_of_its_position() -> None:
    word = KNOWN_ANSWERS[0][2][0]
    assert uniforms(0, np.array([0]))[0] == (2 * (word >> 9) + 1) / 2**24


def test_large_positions_and_seeds_use_all_their_bits() -> None:
    positions = np.array([5, 5 + (1 << 32), 5 + (1 << 40)])
    draws = np.concatenate([uniforms(seed, positions) for seed in (3, 3 + (1 << 32), (1 << 64) - 1)])
    assert len(set(draws.tolist())) == draws.size


@given(st.integers(0, (1 << 64) - 1), st.lists(st.integers(0, 1 << 40), min_size=1, max_size=20))
def test_a_draw_depends_on_its_own_position_only(seed: int, positions: list[int]) -> None:
    together = uniforms(seed, np.array(positions))
    alone = [uniforms(seed, np.array([position]))[0] for position in positions]
    assert together.tolist() == alone
    assert together.dtype == np.float32


@given(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 1 << 40),
    st.lists(st.integers(0, 10_000), min_size=0, max_size=20),
)
def test_numbers_made_in_chunks_are_the_same(seed: int, start: int, offsets: list[int]) -> None:
    positions = start + np.array(offsets, np.int64)
    made = draws(seed, positions)
    assert made.dtype == np.float32
    assert made.tolist() == uniforms(seed, positions).tolist()


def test_open_interval_and_uniformity() -> None:
    draws = uniforms(7, np.arange(200_000).reshape(400, 500))
    assert draws.shape == (400, 500)
    flat = draws.ravel().astype(np.float64)
    assert flat.min() > 0
    assert flat.max() < 1
    assert np.all((flat * 2**24) % 2 == 1)
    assert stats.kstest(flat, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(flat[:-1], flat[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(flat, uniforms(8, np.arange(flat.size)))[0, 1]) < 0.01


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(UsageError, match="seed"):
        uniforms(seed, np.array([0]))
