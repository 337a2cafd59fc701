"""Arrays from .npy files, whose headers are checked before anything is believed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diagd.errors import UsageError

_MAGIC = b"\x93NUMPY"


def read_array(path: Path, what: str) -> NDArray[np.generic]:
    """Read an array of numbers.

    Args:
        path: of the file; its content decides, not its name.
        what: it should be, for the message.

    Raises:
        UsageError: it is missing, another kind of file, cut off, or no array of numbers.
    """
    try:
        with path.open("rb") as file:
            _check(file.read(len(_MAGIC)))
            file.seek(0)
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
            held, said = path.stat().st_size - file.tell(), math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError("it holds Python objects, not numbers")
        if held != said or min(shape, default=0) < 0:
            raise ValueError(f"its header says {dtype} {list(shape)}, {said} bytes; it has {held}")
        return np.asarray(np.load(path, allow_pickle=False))
    except Exception as error:  # NumPy raises whatever its parsers meet
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"{path} is no .npy array of {what}: {reason}") from error


def _check(begin: bytes) -> None:
    if begin == _MAGIC:
        return
    if begin.startswith(b"PK"):
        raise ValueError("it is a .npz of several arrays; save the one that is meant with numpy.save")
    raise ValueError("it does not begin as one")
