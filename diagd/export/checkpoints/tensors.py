"""Tensor handles: shape and dtype at once, bytes when asked."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.errors import CheckpointError, require

Shape = tuple[int, ...]

# Files of both formats are little-endian.
_NUMPY_CODES = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "i1",
    "uint64": "<u8",
    "uint32": "<u4",
    "uint16": "<u2",
    "uint8": "u1",
    "bool": "?",
}


def is_readable(dtype: str) -> bool:
    """Whether arrays of this dtype can be read."""
    return dtype in _NUMPY_CODES


def item_bytes(dtype: str) -> int:
    """Bytes of one element of a readable dtype."""
    return np.dtype(_NUMPY_CODES[dtype]).itemsize


@dataclass(frozen=True)
class TensorHandle(ABC):
    """A tensor that has not been read yet.

    Attributes:
        shape: size of each axis.
        dtype: name such as ``float32``, ``float16`` or ``bfloat16``.
    """

    shape: Shape
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array that `read` returns."""
        return self.size * item_bytes(self.dtype)

    @abstractmethod
    def read(self) -> NDArray[Any]:
        """The whole tensor, C-contiguous and possibly read-only; bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
            CheckpointError: the dtype has no array form, or the file changed since it was opened.
        """

    @abstractmethod
    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start <= row < stop`` of axis 0, as `read` would give them.

        Raises:
            IndexError: the rows are not within the tensor.
            CheckpointError: as in `read`.
        """

    def _check_rows(self, start: int, stop: int) -> None:
        rows = self.shape[0] if self.shape else 0
        if not self.shape or not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of a tensor of shape {self.shape}")


@dataclass(frozen=True)
class MappedTensor(TensorHandle):
    """A tensor inside a file; each read maps only its own pages, which go when the array goes.

    Attributes:
        file: file that holds the tensor.
        offset: byte of the first element.
        strides: elements between neighbours along each axis, not negative.
    """

    file: Path
    offset: int
    strides: Shape

    def read(self) -> NDArray[Any]:
        """The whole tensor, read-only where it is contiguous in the file."""
        return self._map(self.shape, self.offset)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows of axis 0; only the pages they touch are read."""
        self._check_rows(start, stop)
        skipped = start * self.strides[0] * item_bytes(self.dtype)
        return self._map((stop - start, *self.shape[1:]), self.offset + skipped)

    def _map(self, shape: Shape, offset: int) -> NDArray[Any]:
        dtype = np.dtype(_NUMPY_CODES[self.dtype])
        span = span_of(shape, self.strides)
        stored: NDArray[Any]
        if span:
            stored = np.asarray(self._map_bytes(offset, span * dtype.itemsize)).view(dtype)
        else:
            stored = np.empty(0, dtype)
        steps = tuple(step * dtype.itemsize for step in self.strides)
        view = np.lib.stride_tricks.as_strided(stored, shape, steps, writeable=False)
        array = np.require(view, None, ["C", "A"])
        if self.dtype == "bfloat16":
            array = array.view(require("ml_dtypes", extra="export", purpose="read bfloat16 tensors").bfloat16)
        return array

    def _map_bytes(self, offset: int, count: int) -> NDArray[np.uint8]:
        try:
            return np.memmap(self.file, np.uint8, "r", offset, (count,))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.file} changed since it was opened: {count} bytes at {offset} cannot be read "
                f"({error}); run again once the file is complete"
            ) from error


@dataclass(frozen=True)
class UnreadableTensor(TensorHandle):
    """A tensor whose dtype has no array form here (fp8, quantised, complex): known, but not readable.

    Attributes:
        stored_bytes: bytes it takes in its file.
    """

    stored_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes it takes in its file."""
        return self.stored_bytes

    def read(self) -> NDArray[Any]:
        """Always raises `CheckpointError`."""
        raise CheckpointError(
            f"a tensor of dtype {self.dtype} cannot be read; use a checkpoint in bfloat16, float16 or float32"
        )

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Always raises `CheckpointError`."""
        return self.read()


def span_of(shape: Shape, strides: Shape) -> int:
    """Elements from the first to the last one of a strided tensor, 0 when it is empty."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def contiguous_strides(shape: Shape) -> Shape:
    """Strides, in elements, of a C-contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
