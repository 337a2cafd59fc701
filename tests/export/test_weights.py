"""The weights file: aligned, in order, converted and transposed while streaming."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagd.errors import CheckpointError
from diagd.export import weights
from diagd.export.checkpoints import Checkpoint, RandomCheckpoint


@pytest.fixture
def checkpoint() -> Checkpoint:
    shapes = {"q": (6, 4), "k": (2, 4), "v": (2, 4), "gain": (4,), "scalar": ()}
    return RandomCheckpoint(shapes, seed=3)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("chunk", [16, 64 << 20])
def test_tensors_lie_where_the_plan_says(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, chunk: int
) -> None:
    monkeypatch.setattr(weights, "CHUNK_BYTES", chunk)
    dtype = np.dtype({"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[precision])
    table = np.arange(6, dtype=np.int32).reshape(3, 2)
    sources = {
        "qkv": weights.transposed([checkpoint["q"], checkpoint["k"], checkpoint["v"]]),
        "gain": weights.copied(checkpoint["gain"]),
        "scalar": weights.copied(checkpoint["scalar"]),
        "query": weights.copied(checkpoint["q"]),
        "table": weights.constant(table),
    }
    places = weights.plan(
        {name: (s.shape, np.dtype(np.int32) if name == "table" else dtype) for name, s in sources.items()}
    )
    advanced: list[int] = []
    weights.write(tmp_path / "weights.bin", places, sources, advanced.append)
    content = (tmp_path / "weights.bin").read_bytes()
    fused = np.concatenate([checkpoint[name].read() for name in ("q", "k", "v")]).T
    expected = {
        "qkv": fused,
        "gain": checkpoint["gain"].read(),
        "scalar": checkpoint["scalar"].read(),
        "query": checkpoint["q"].read(),
        "table": table,
    }
    for name, place in places.items():
        assert place.offset % weights.ALIGNMENT == 0
        stored = np.frombuffer(content, place.dtype, place.length // place.dtype.itemsize, place.offset)
        np.testing.assert_array_equal(stored.reshape(place.shape), expected[name].astype(place.dtype))
    assert sum(advanced) == sum(place.length for place in places.values())
    assert len(content) == weights.total_bytes(places)


@given(st.lists(st.lists(st.integers(0, 40), max_size=3), max_size=8))
def test_tensors_never_overlap(shapes: list[list[int]]) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16)
    places = weights.plan({str(n): (tuple(shape), dtype) for n, shape in enumerate(shapes)})
    spans = sorted((p.offset, p.offset + p.length) for p in places.values() if p.length)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_a_number_too_large_for_float16_is_named(tmp_path: Path, dtype: type[np.generic]) -> None:
    large = np.array([1.0, 1e6, -3e5], dtype)
    places = weights.plan({"transformer.layers.0.qkv": ((3,), np.dtype(np.float16))})
    sources = {"transformer.layers.0.qkv": weights.constant(large)}
    with pytest.raises(CheckpointError, match=r"'layers\.0\.qkv' holds 1e\+06.*ends at 65504.*fp32"):
        weights.write(tmp_path / "weights.bin", places, sources)


def test_what_is_infinite_already_is_no_overflow(tmp_path: Path) -> None:
    places = weights.plan({"mask": ((2,), np.dtype(np.float16))})
    mask = weights.constant(np.array([-np.inf, 1], np.float32))
    weights.write(tmp_path / "weights.bin", places, {"mask": mask})
    assert np.fromfile(tmp_path / "weights.bin", np.float16).tolist() == [-np.inf, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_no_number_is_named(tmp_path: Path, dtype: type[np.generic]) -> None:
    places = weights.plan({"transformer.norm.weight": ((2,), np.dtype(np.float32))})
    broken = {"transformer.norm.weight": weights.constant(np.array([1, np.nan], dtype))}
    with pytest.raises(CheckpointError, match=r"'norm\.weight' holds nan"):
        weights.write(tmp_path / "weights.bin", places, broken)
