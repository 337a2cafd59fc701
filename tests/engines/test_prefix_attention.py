"""Attention of the prefix form on the host, against its definition in float64."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from diagd.engines.devices.kernels import host_build
from diagd.engines.engine import VOID
from diagd.engines.host import instruction_sets
from tests.engines.host_device import ROOT

Array = NDArray[np.float32]


POINTERS = (
    *("fused", "bias", "query_norm", "key_norm", "cosines", "sines"),
    *("positions", "slot_position", "written", "keys", "values", "out"),
)
EPSILON = 1e-6


class Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("slots", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("streams", "width", "groups", "shared", "size")),
        ("epsilon", ctypes.c_float),
    )


@dataclass
class Case:
    """Rows of a step, and slots, of which each row sees those up to its position.

    Attributes:
        fused: [B, W, G * shared + 2 G, D], queries, keys and values of rows.
        keys, values: [T, B, G, D] of slots; those of the step's rows are written.
        written: [B, W], slots of the rows.
        further: of bias, query_norm, key_norm, cosines and sines those that the model has.
    """

    fused: Array
    keys: Array
    values: Array
    positions: NDArray[np.int32]
    slot_position: NDArray[np.int32]
    written: NDArray[np.int64]
    further: dict[str, Array] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        groups: int = self.keys.shape[2]
        return groups

    def attended(self, threads: int = 1, kernels: ctypes.CDLL | None = None) -> Array:
        kernels = kernels or host_build()
        assert kernels is not None, "no C++ compiler built the package"
        streams, width, heads, size = self.fused.shape
        queries = heads - 2 * self.groups
        out = np.full((streams, width, self.groups, queries // self.groups, size), np.nan, np.float32)
        arrays = vars(self) | self.further | {"out": out}
        pointers = (arrays[name].ctypes.data if name in arrays else None for name in POINTERS)
        arguments = Arguments(*pointers, len(self.keys), *out.shape, EPSILON)
        kernels.diagd_bound_attention(ctypes.byref(arguments), threads)
        return out

    def prepared(self) -> list[NDArray[np.float64]]:
        """Queries [B, W, G, shared, D], keys and values [B, W, G, D] as attention takes them."""
        heads = self.fused.astype(np.float64)
        heads += self.further.get("bias", np.zeros(heads.shape[2:]))
        queries, keys, values = np.split(heads, [heads.shape[2] - 2 * self.groups, -self.groups], axis=2)
        queries, keys = self.turned(queries, "query_norm"), self.turned(keys, "key_norm")
        return [queries.reshape(*heads.shape[:2], self.groups, -1, heads.shape[3]), keys, values]

    def turned(self, part: NDArray[np.float64], norm: str) -> NDArray[np.float64]:
        if norm in self.further:
            part = part / np.sqrt((part**2).mean(-1, keepdims=True) + EPSILON) * self.further[norm]
        if "cosines" not in self.further:
            return part
        cosines, sines = (self.further[name][:, :, None] for name in ("cosines", "sines"))
        first, second = np.split(part, 2, axis=-1)
        return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)

    def expected(self) -> NDArray[np.float64]:
        """Attended values [B, W, G, shared, D]; the case's keys and values have the rows in them."""
        queries, *_ = self.prepared()
        scores = np.einsum("bwghd,tbgd->bwght", queries, self.keys) / np.sqrt(queries.shape[-1])
        seen = self.slot_position.T[:, None] <= self.positions[:, :, None]
        scores = np.where(seen[:, :, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        made: NDArray[np.float64] = np.einsum("bwght,tbgd->bwghd", weights, self.values.astype(np.float64))
        return made


def random_case(random: np.random.Generator) -> Case:
    streams, groups, shared = (int(random.integers(1, most)) for most in (6, 4, 6))
    width = int(random.integers(1, 34))
    slots = width + int(random.integers(300))
    size = int(random.choice([2, 6, 8, 20, 32, 64, 72]))
    slot_position = random.integers(0, 50, (slots, streams)).astype(np.int32)
    slot_position[random.random(slot_position.shape) < 0.2] = VOID
    slot_position[random.integers(slots)] = 0
    keys, values = (random.standard_normal((slots, streams, groups, size), np.float32) for _ in range(2))
    fused = random.standard_normal((streams, width, groups * (shared + 2), size), np.float32)
    fused[:, :, : groups * shared] *= np.float32(10.0 ** random.integers(-2, 2))
    written = np.stack([random.permutation(slots)[:width] for _ in range(streams)])
    angles = random.uniform(0, 9, (streams, width, size // 2))
    tables = {"cosines": np.cos(angles), "sines": np.sin(angles)}
    norms = {name: random.uniform(0.5, 2, size) for name in ("query_norm", "key_norm")}
    parts = {"bias": random.standard_normal(fused.shape[2:])}, norms, tables
    further = {
        name: array.astype(np.float32)
        for part in parts
        if random.random() < 0.5
        for name, array in part.items()
    }
    positions = random.integers(0, 60, (streams, width), np.int32)
    return Case(fused, keys, values, positions, slot_position, written, further)


@pytest.mark.parametrize("seed", range(40))
def test_rows_are_what_they_see_weighed_by_its_softmax(seed: int) -> None:
    case = random_case(np.random.default_rng(seed))
    before = case.keys.copy(), case.values.copy()
    attended = case.attended()
    stream = np.arange(len(case.written))[:, None]
    for rows, slots, kept in zip(case.prepared()[1:], (case.keys, case.values), before, strict=True):
        np.testing.assert_allclose(slots[case.written, stream], rows, rtol=0, atol=3e-6)
        kept[case.written, stream] = slots[case.written, stream]
        np.testing.assert_array_equal(slots, kept)  # all others are as they were
    np.testing.assert_allclose(attended, case.expected(), rtol=0, atol=3e-5)


@pytest.mark.parametrize("processor", ["{true,true}", "{}"], ids=["AVX2", "plain"])
def test_older_processors_attend_alike(tmp_path: Path, processor: str) -> None:
    if processor != "{}" and "avx2" not in instruction_sets():
        pytest.skip("this processor has no AVX2")
    file, given = tmp_path / "attention.so", f"-DDIAGD_PROCESSOR={processor}"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", given, "-o", str(file)]
    subprocess.run(["c++", *options, str(ROOT / "native" / "prefix_attention.cpp")], check=True)
    kernels = ctypes.CDLL(str(file))
    for seed in range(40, 60):
        case = random_case(np.random.default_rng(seed))
        attended = case.attended(1, kernels)
        np.testing.assert_allclose(attended, case.expected(), rtol=0, atol=3e-5)
        np.testing.assert_array_equal(case.attended(3, kernels), attended)


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
        one = np.s_[stream : stream + 1, row : row + 1]
        alone = Case(
            case.fused[one].copy(),
            np.concatenate([case.keys[mine], behind]),
            np.concatenate([case.values[mine], behind]),
            case.positions[one].copy(),
            np.concatenate([case.slot_position[mine], hidden]),
            case.written[one].copy(),
            {name: array[one].copy() if array.ndim == 3 else array for name, array in case.further.items()},
        )
        np.testing.assert_array_equal(alone.attended()[0, 0], every[stream, row])


@pytest.mark.parametrize("columns", [1, 5, 8, 16, 40, 513])
def test_gates_have_the_same_bits_beside_any_others(columns: int) -> None:
    kernels = host_build()
    assert kernels is not None, "no C++ compiler built the package"
    random = np.random.default_rng(columns)
    gates, ups = (random.standard_normal((2, columns)) * 8).astype(np.float32)
    gates[0], ups[-1] = np.nan if columns > 1 else -200, 3

    def gated(first: int, last: int) -> Array:
        out = np.full(last - first + 1, np.pi, np.float32)
        parts = [array[first:last].copy() for array in (gates, ups)]
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (*parts, out)]
        kernels.diagd_gate(*pointers[:2], ctypes.c_int64(last - first), pointers[2])
        assert out[-1] == np.float32(np.pi)  # nothing is written behind
        return out[:-1]

    every = gated(0, columns)
    with np.errstate(over="ignore"):
        expected = gates.astype(np.float64) / (1 + np.exp(-gates.astype(np.float64))) * ups
    np.testing.assert_allclose(every, expected, rtol=4e-6, atol=1e-30)
    for column in range(columns):
        np.testing.assert_array_equal(gated(column, columns), every[column:])


@pytest.mark.parametrize("columns", [1, 7, 64, 190, 1027])
def test_a_row_with_what_it_is_given_is_normalised(columns: int) -> None:
    class Row(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_void_p) for name in ("x", "added", "weight", "sum", "out")),
            ("columns", ctypes.c_int64),
            ("epsilon", ctypes.c_float),
        )

    kernels = host_build()
    assert kernels is not None, "no C++ compiler built the package"
    random = np.random.default_rng(columns)
    x, added, weight = random.standard_normal((3, columns)).astype(np.float32)
    total, out = np.full((2, columns + 1), np.pi, np.float32)
    pointers = (array.ctypes.data for array in (x, added, weight, total, out))
    kernels.diagd_normalise(ctypes.byref(Row(*pointers, columns, 1e-3)))
    np.testing.assert_array_equal(total, np.append(x + added, np.float32(np.pi)))
    wide = total[:-1].astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean() + np.float32(1e-3)) * weight
    np.testing.assert_allclose(out, np.append(expected, np.float32(np.pi)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00155, 0x7FFFFFFF, 0xFFFFFFFF])
def test_what_is_not_a_number_is_not_hidden(bits: int) -> None:
    case = random_case(np.random.default_rng(7))
    case.slot_position[0], case.keys[0] = 0, np.uint32(bits).view(np.float32)
    case.written += case.written == 0  # is not written over
    assert np.isnan(case.attended()).all()
