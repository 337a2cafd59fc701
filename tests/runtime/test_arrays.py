"""Files of arrays that are not what they say end in one line."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from diagd.errors import UsageError
from diagd.runtime.arrays import read_array, read_arrays, read_ids


def test_arrays_of_any_kind_of_number(tmp_path: Path) -> None:
    for array in (np.arange(6, dtype=np.int16).reshape(2, 3), np.zeros((0, 4)), np.float32(3)):
        np.save(tmp_path / "a.npy", array)
        np.testing.assert_array_equal(read_array(tmp_path / "a.npy", "tokens"), array)
    np.save(tmp_path / "f.npy", np.asfortranarray(np.arange(6).reshape(2, 3)))
    np.testing.assert_array_equal(read_array(tmp_path / "f.npy", "tokens"), np.arange(6).reshape(2, 3))


def header(text: str) -> bytes:
    padded = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode("latin-1")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUM",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<!doctype html>",
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,)}"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (-1,)}"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (3,)}") + bytes(11),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + bytes(8),
        header("{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,)}"),
        header("{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}") + bytes(16),
        header("{'descr': '|V2', 'fortran_order': False, 'shape': (1,)}") + bytes(2),
        header("{'descr': '<c8', 'fortran_order': False, 'shape': (1,)}") + bytes(8),
        header("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1,)}") + bytes(4),
        header("__import__('os').system('true')"),
        header("(" * 110),
        header("{}"),
    ],
)
def test_what_is_no_array_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UsageError, match=r"no \.npy array of tokens"):
        read_array(tmp_path / "a.npy", "tokens")


def test_a_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UsageError, match="git lfs pull"):
        read_array(tmp_path / "a.npy", "tokens")
    with pytest.raises(UsageError, match="git lfs pull"):
        read_arrays(tmp_path / "a.npy", ("frames",), "episode")


def test_a_npz_under_the_name_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", tokens=np.zeros(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(UsageError, match=r"\.npz of several arrays"):
        read_array(tmp_path / "a.npy", "tokens")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_array(tmp_path / "a.npy", "tokens")
    with pytest.raises(UsageError, match="Is a directory"):
        read_array(tmp_path, "tokens")


def test_arrays_of_an_archive(tmp_path: Path) -> None:
    big = np.arange(6, dtype=">i4").reshape(2, 3)
    np.savez_compressed(tmp_path / "a.npz", big=big, columns=np.asfortranarray(big), name=np.array("left"))
    found = read_arrays(tmp_path / "a.npz", ("big", "columns", "name", "none"), "recording")
    assert found.keys() == {"big", "columns", "name"}
    np.testing.assert_array_equal(found["big"], big)
    np.testing.assert_array_equal(found["columns"], big)
    assert str(found["name"]) == "left"


def archive(path: Path, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("frames.npy", content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no array",
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (1 << 50,)}"),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999,)}") + bytes(9),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (9,)}") + bytes(1 << 20),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + b"cos\nsystem\n(S'true'\ntR.",
    ],
)
def test_what_an_archive_holds_is_not_believed(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no recording: "):
        read_arrays(archive(tmp_path / "a.npz", content), ("frames",), "recording")


@pytest.mark.parametrize("place", range(0, 140, 7))
def test_a_damaged_archive_is_one_line(place: int, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", frames=np.arange(9, dtype=np.uint8))
    whole = (tmp_path / "a.npz").read_bytes()
    for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]):
        (tmp_path / "a.npz").write_bytes(damaged)
        try:
            read_arrays(tmp_path / "a.npz", ("frames",), "recording")
        except UsageError as error:
            assert "is no recording" in str(error)


def test_tokens_are_whole_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full(3, np.nan))
    with pytest.raises(UsageError, match="holds float64; expected tokens, which are whole numbers"):
        read_ids(tmp_path / "a.npy")
