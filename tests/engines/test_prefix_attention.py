"""Attention of the prefix form on the host, against its definition in float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from diagd.engines.devices.kernels import host_build
from diagd.engines.engine import VOID

Array = NDArray[np.float32]


@dataclass
class Case:
    """Rows of a step [B, W, G, shared, D]; of slots [T, B, G, D] each sees those up to its position."""

    queries: Array
    keys: Array
    values: Array
    positions: NDArray[np.int32]
    slot_position: NDArray[np.int32]

    def attended(self, threads: int = 1) -> Array:
        class Arguments(ctypes.Structure):
            _fields_ = (
                *((name, ctypes.c_void_p) for name in (*vars(self), "out")),
                ("slots", ctypes.c_int64),
                *((name, ctypes.c_int32) for name in ("streams", "width", "groups", "shared", "size")),
                ("scale", ctypes.c_float),
            )

        kernels = host_build()
        assert kernels is not None, "no C++ compiler built the package"
        out = np.full_like(self.queries, np.nan)
        scale = np.log2(np.e) / np.sqrt(self.queries.shape[-1])
        pointers = (array.ctypes.data for array in (*vars(self).values(), out))
        arguments = Arguments(*pointers, len(self.keys), *self.queries.shape, scale)
        kernels.diagd_prefix_attention(ctypes.byref(arguments), threads)
        return out

    def expected(self) -> NDArray[np.float64]:
        size = self.queries.shape[-1]
        scores = np.einsum("bwghd,tbgd->bwght", self.queries.astype(np.float64), self.keys) / np.sqrt(size)
        seen = self.slot_position.T[:, None] <= self.positions[:, :, None]
        scores = np.where(seen[:, :, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("bwght,tbgd->bwghd", weights, self.values.astype(np.float64))


def random_case(random: np.random.Generator) -> Case:
    streams, groups, shared = (int(random.integers(1, most)) for most in (6, 4, 6))
    width, slots = int(random.integers(1, 34)), int(random.integers(1, 300))
    size = int(random.choice([2, 6, 8, 20, 32, 64, 72]))
    slot_position = random.integers(0, 50, (slots, streams)).astype(np.int32)
    slot_position[random.random(slot_position.shape) < 0.2] = VOID
    slot_position[random.integers(slots)] = 0
    keys, values = (random.standard_normal((slots, streams, groups, size), np.float32) for _ in range(2))
    queries = random.standard_normal((streams, width, groups, shared, size), np.float32)
    scale = np.float32(10.0 ** random.integers(-2, 2))
    return Case(
        queries * scale, keys, values, random.integers(0, 60, (streams, width), np.int32), slot_position
    )


@pytest.mark.parametrize("seed", range(40))
def test_rows_are_what_they_see_weighed_by_its_softmax(seed: int) -> None:
    case = random_case(np.random.default_rng(seed))
    np.testing.assert_allclose(case.attended(), case.expected(), rtol=0, atol=3e-5)


@pytest.mark.parametrize("seed", range(20))
def test_a_row_does_not_depend_on_rows_streams_slots_and_threads_beside_it(seed: int) -> None:
    random = np.random.default_rng(100 + seed)
    case = random_case(random)
    every = case.attended()
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(case.attended(threads), every)
    for stream, positions in enumerate(case.positions):
        row = int(random.integers(len(positions)))
        mine = np.s_[:, stream : stream + 1]
        hidden = np.full((int(random.integers(200)), 1), VOID, np.int32)  # bound behind, for longer streams
        behind = random.standard_normal((len(hidden), 1, *case.keys.shape[2:]), np.float32)
        alone = Case(
            case.queries[stream : stream + 1, row : row + 1].copy(),
            *(np.concatenate([array[mine], behind]) for array in (case.keys, case.values)),
            case.positions[stream : stream + 1, row : row + 1].copy(),
            np.concatenate([case.slot_position[mine], hidden]),
        )
        np.testing.assert_array_equal(alone.attended()[0, 0], every[stream, row])


def test_what_is_not_a_number_is_not_hidden() -> None:
    case = random_case(np.random.default_rng(7))
    case.slot_position[0], case.keys[0] = 0, np.nan
    assert np.isnan(case.attended()).all()
