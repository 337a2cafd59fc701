"""Files of text embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from diagd.errors import UsageError
from diagd.runtime.text import read_embeddings

TEXT = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_of_any_float_are_read(tmp_path: Path, dtype: type[np.floating]) -> None:
    np.save(tmp_path / "text.npy", TEXT.astype(dtype))
    read = read_embeddings(tmp_path / "text.npy")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, TEXT.astype(dtype).astype(np.float32))


def test_a_batch_of_one_and_safetensors_are_read(tmp_path: Path) -> None:
    save_file({"embeddings": TEXT[None]}, tmp_path / "text.safetensors")
    np.testing.assert_array_equal(read_embeddings(tmp_path / "text.safetensors"), TEXT)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": TEXT, "b": TEXT}, "holds 2 tensors"),
        ({"a": TEXT[0]}, r"shape \[8\]; expected finite"),
        ({"a": np.full((2, 3), np.nan, np.float32)}, "expected finite"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    save_file(arrays, tmp_path / "text.safetensors")
    with pytest.raises(UsageError, match=message):
        read_embeddings(tmp_path / "text.safetensors")


@pytest.mark.parametrize("name", ["text.npy", "text.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no embeddings at all", None])
def test_damaged_and_missing_files_are_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="holds no text embeddings"):
        read_embeddings(tmp_path / name)
