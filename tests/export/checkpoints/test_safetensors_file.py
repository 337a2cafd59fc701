"""Safetensors files written by the reference library, whole and damaged."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diagd.errors import CheckpointError, UsageError
from diagd.export.checkpoints import open_checkpoint, save_tensors


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
)
def test_dtypes_and_metadata(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"b": torch.arange(6).reshape(2, 3).to(dtype), "a": torch.ones(()).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint) == {"a", "b"}
    assert checkpoint.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert checkpoint[name].dtype == str(dtype).removeprefix("torch.")
        assert checkpoint[name].read().nbytes == tensor.nbytes
        np.testing.assert_array_equal(checkpoint[name].read().astype(np.float64), tensor.double().numpy())
    np.testing.assert_array_equal(
        checkpoint["b"].read_rows(1, 2).astype(np.float64), tensors["b"][1:].double().numpy()
    )


def test_fp8_is_known_but_not_read(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3, 2, dtype=torch.float8_e4m3fn)}, tmp_path / "w.safetensors")
    handle = open_checkpoint(tmp_path / "w.safetensors")["w"]
    assert (handle.dtype, handle.shape, handle.size) == ("float8_e4m3fn", (3, 2), 6)
    with pytest.raises(CheckpointError, match="float8_e4m3fn"):
        handle.read()


def write(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(**changes: object) -> dict[str, dict[str, object]]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def test_name_need_not_end_in_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "weights", entry(), np.array([1, 2], "<f4").tobytes())
    assert list(open_checkpoint(tmp_path / "weights")["w"].read()) == [1, 2]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (entry(data_offsets=[0, 12]), "cut short"),
        (entry(data_offsets=[4, 8]), "'?w'?"),
        (entry(data_offsets=[8, 0]), "'?w'?"),
        (entry(data_offsets=[-8, 0]), "invalid value: integer `-8`"),
        (entry(data_offsets=[0]), "invalid length 1"),
        (entry(shape=[-2]), "invalid value: integer `-2`"),
        (entry(shape=[True, 2]), "invalid type: boolean"),
        (entry(shape=None), "invalid type: null"),
        (entry(dtype="F33"), "unknown variant `F33`"),
        (entry(shape=[2**62, 4]), "overflow|arithmetic"),
        (entry() | {"v": entry()["w"]}, "'?v'?|'?w'?"),
        ({"w": 3}, "expected struct TensorInfo"),
        ([1], "invalid type: sequence"),
        (b"{not json", "key must be a string"),
        (b"{" * 100_000, "key must be a string|recursion"),
    ],
)
def test_malformed_headers(tmp_path: Path, header: object, message: str) -> None:
    write(tmp_path / "w.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("kept", [1, 7, 8, 40, -1])
def test_truncated_download(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(8)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"cut short|is not a safetensors"):
        open_checkpoint(path)


def test_announced_header_is_not_allocated(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header too large"):
        open_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_is_written_has_the_rights_of_other_files(tmp_path: Path, umask: int) -> None:
    path, before = tmp_path / "a.safetensors", os.umask(umask)
    try:
        save_tensors(path, {"a": torch.eye(3).T}, {"format": "pt"})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    checkpoint = open_checkpoint(path)
    assert checkpoint.metadata == {"format": "pt"}
    assert np.array_equal(checkpoint["a"].read(), np.eye(3))


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UsageError, match=r"a.safetensors cannot be written: .*free some space"):
            save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
