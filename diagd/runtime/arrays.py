"""Arrays from .npy and .npz files, whose headers are checked before anything is believed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sized
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.files import instead, open_file
from diagd.engines.host import available_bytes
from diagd.errors import UsageError

_MAGIC = b"\x93NUMPY"
_NUMBERS = "biuf"


def read_array(path: Path, what: str) -> NDArray[np.generic]:
    """Read an array of numbers; the content decides, not the name.

    Raises:
        UsageError: it is missing, another kind of file than ``what``, cut off, or no array of numbers.
    """
    try:
        with open_file(path) as file:
            begin = file.read(len(_MAGIC))
            if begin.startswith(b"PK"):
                raise ValueError("it is a .npz of several arrays; save the one that is meant with numpy.save")
            if begin != _MAGIC:
                raise ValueError("it does not begin as one")
            file.seek(0)
            return _read(file, path.stat().st_size, _NUMBERS)
    except Exception as error:  # NumPy raises whatever its parsers meet
        raise UsageError(f"{path} is no .npy array of {what}: {_reason(path, error)}") from error


def read_ids(path: Path) -> NDArray[np.integer]:
    """Read an array of tokens; UsageError as `read_array`, and where its numbers are not whole."""
    tokens = read_array(path, "tokens")
    if tokens.dtype.kind not in "iu":
        raise UsageError(f"{path} holds {tokens.dtype}; expected tokens, which are whole numbers (int32)")
    return tokens  # type: ignore[return-value]


def whole(ids: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    """Ids int32; UsageError where they are no whole numbers, or so large that they would become others."""
    try:
        given = np.asarray(ids)
    except ValueError as error:
        raise UsageError(
            f"ids are rows of several lengths ({ids!r:.80}); expected an array, int32"
        ) from error
    if given.dtype == np.int32:
        return np.asarray(given, np.int32)
    try:
        with np.errstate(invalid="ignore"):
            kept = given.astype(np.int32) if given.dtype.kind in _NUMBERS + "O" else None
    except (ValueError, TypeError, OverflowError):
        kept = None
    if kept is None or not np.array_equal(kept, given):
        raise UsageError(
            f"ids are {given.dtype} {given.reshape(-1)[:8].tolist()}; expected whole numbers, int32"
        )
    return kept


def rows_in(rows: object) -> int:
    """How many rows there are; 0 where it is none of a known number."""
    return len(rows) if isinstance(rows, Sized) and np.iterable(rows) else 0


def read_arrays(path: Path, names: Collection[str], what: str) -> dict[str, NDArray[np.generic]]:
    """Read arrays of numbers or text from a .npz file, whatever its name; those that it lacks are left out.

    Raises:
        UsageError: it is missing, no ``what``, cut off, or an array is not what its header says.
    """
    try:
        with open_file(path) as opened, ZipFile(opened) as archive:
            held = {info.filename: info for info in archive.infolist()}
            found = {}
            for name in names:
                if (info := held.get(f"{name}.npy")) is not None:
                    with archive.open(info) as file:
                        found[name] = _read(file, info.file_size, _NUMBERS + "U")
        return found
    except Exception as error:  # so do zipfile and its decompressors
        raise UsageError(f"{path} is no {what}: {_reason(path, error)}") from error


def _read(file: IO[bytes], size: int, kinds: str) -> NDArray[np.generic]:
    """The array of an open .npy file of ``size`` bytes."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, not numbers")
    if dtype.kind not in kinds:
        raise ValueError(f"it holds {dtype}, expected numbers")
    held, said = size - file.tell(), math.prod(shape) * dtype.itemsize
    if held != said or min(shape, default=0) < 0:
        raise ValueError(f"its header says {dtype} {list(shape)}, {said} bytes; it has {held}")
    free = available_bytes()
    if free is not None and said > free:
        raise ValueError(f"it takes {said / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free")
    file.seek(0)
    return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _reason(path: Path, error: Exception) -> str:
    if what := instead(path):
        return f"it {what}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
