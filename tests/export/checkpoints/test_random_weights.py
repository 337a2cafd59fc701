"""Random weights: the same bytes whichever way they are read."""

import hashlib
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from diagd.export.checkpoints import RandomCheckpoint, initial_moments

SHAPES = {"embed.weight": (301, 17), "conv.weight": (5, 3, 2, 2), "norm.weight": (33,), "norm.bias": (33,)}


def test_names_shapes_and_scale() -> None:
    checkpoint = RandomCheckpoint(SHAPES, seed=1)
    assert {name: handle.shape for name, handle in checkpoint.items()} == SHAPES
    assert {handle.dtype for handle in checkpoint.values()} == {"float32"}
    assert (checkpoint["norm.weight"].read() == 1).all()
    assert (checkpoint["norm.bias"].read() == 0).all()
    large = RandomCheckpoint({"w": (2000, 400)}, seed=1)["w"].read()
    assert large.dtype == np.float32
    # 800,000 draws: standard errors are 5.6e-5 of the mean and about 4e-5 of the deviation.
    assert abs(large.mean()) < 3e-4
    assert abs(large.std() - 0.05) < 3e-4
    assert np.abs(large).max() < 0.05 * math.sqrt(3)
    neighbours = np.corrcoef(large[:, :-1].ravel(), large[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 6e-3


@settings(max_examples=40)
@given(st.integers(0, 400), st.integers(0, 400), st.sampled_from([(1, 1), (7,), (3, 5), (16,)]))
def test_any_rows_are_those_of_the_whole(first: int, second: int, rest: tuple[int, ...]) -> None:
    start, stop = sorted((first, second))
    checkpoint = RandomCheckpoint({"w": (400, *rest)}, seed=7)
    rows = checkpoint["w"].read_rows(start, stop)
    np.testing.assert_array_equal(rows, checkpoint["w"].read()[start:stop])


def test_rows_across_internal_chunks() -> None:
    handle = RandomCheckpoint({"w": (1100, 2003)}, seed=3)["w"]
    whole = handle.read()
    for start, stop in ((0, 1100), (523, 524), (500, 1099)):
        np.testing.assert_array_equal(handle.read_rows(start, stop), whole[start:stop])


def philox(counter: int, key: int) -> list[int]:
    """One block of Philox4x64-10 (Salmon et al., 2011), in Python integers."""
    mask = 2**64 - 1
    x = [counter >> 64 * word & mask for word in range(4)]
    k = [key & mask, key >> 64]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [second >> 64 ^ x[1] ^ k[0], second & mask, first >> 64 ^ x[3] ^ k[1], first & mask]
        k = [k[0] + 0x9E3779B97F4A7C15 & mask, k[1] + 0xBB67AE8584CAA73B & mask]
    return x


def test_elements_are_those_of_the_published_generator() -> None:
    """A change of generator, here or in NumPy, would silently change everyone's random models."""
    key = int.from_bytes(hashlib.blake2b(b"42/layers.0.wq.weight", digest_size=16).digest(), "little")
    words = [word for block in range(1, 6) for word in philox(block, key)]
    draws = [word >> 16 * part & 0xFFFF for word in words for part in range(4)]
    signed = np.array([draw - 2**16 if draw >= 2**15 else draw for draw in draws])
    expected = (signed + 0.5) / 2**15 * math.sqrt(3) / math.sqrt(8)
    values = RandomCheckpoint({"layers.0.wq.weight": (10, 8)}, seed=42)["layers.0.wq.weight"].read()
    np.testing.assert_allclose(values.ravel(), expected, rtol=1e-6)


def test_seed_and_name_decide() -> None:
    def first(name: str, seed: int) -> NDArray[np.float32]:
        return RandomCheckpoint({name: (4, 64)}, seed=seed)[name].read()

    assert (first("a", 0) == first("a", 0)).all()
    assert (first("a", 0) != first("a", 1)).mean() > 0.9
    assert (first("a", 0) != first("b", 0)).mean() > 0.9


def test_order_of_reading_makes_no_difference() -> None:
    forward = {name: handle.read() for name, handle in RandomCheckpoint(SHAPES, seed=5).items()}
    backward = RandomCheckpoint(dict(reversed(SHAPES.items())), seed=5)
    for name in reversed(SHAPES):
        np.testing.assert_array_equal(backward[name].read(), forward[name])


def test_a_gigabyte_matrix_is_read_in_rows() -> None:
    handle = RandomCheckpoint({"head": (64000, 4096)}, seed=0)["head"]
    assert handle.size == 64000 * 4096
    tracemalloc.start()
    try:
        rows = handle.read_rows(63000, 63064)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows.shape == (64, 4096) and np.isfinite(rows).all()
    assert peak < 16e6


@pytest.mark.parametrize(
    ("name", "shape", "moments"),
    [
        ("wq.weight", (8, 64), (0, 0.125)),
        ("conv.weight", (8, 4, 2, 2), (0, 0.25)),
        ("norm.weight", (8,), (1, 0)),
        ("c_attn.bias", (8,), (0, 0)),
        ("scale", (), (1, 0)),
        ("empty", (3, 0), (0, 1)),
    ],
)
def test_initial_moments(name: str, shape: tuple[int, ...], moments: tuple[float, float]) -> None:
    assert initial_moments(name, shape) == moments


def test_activations_stay_of_order_one() -> None:
    width, layers = 128, 12
    checkpoint = RandomCheckpoint({f"{layer}.weight": (width, width) for layer in range(layers)}, seed=0)
    hidden = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    for handle in checkpoint.values():
        hidden = handle.read() @ hidden
    assert 0.1 < hidden.std() < 10
