"""Named tensors that have not been read yet: shape and dtype at once, values row by row when asked."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from diagd.errors import CheckpointError

Shape = tuple[int, ...]

WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")
READABLE = {*WEIGHT_DTYPES, "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


@dataclass(frozen=True)
class TensorHandle(ABC):
    """A tensor of a checkpoint.

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

    def read(self) -> NDArray[Any]:
        """The whole tensor, C-contiguous and possibly read-only; bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
            CheckpointError: the dtype has no array form, or the file changed since it was opened.
        """
        return self.read_rows(0, self.shape[0]) if self.shape else self._readable(0, 1).reshape(())

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start <= row < stop`` of axis 0, as `read` would give them; no others are read.

        Raises:
            IndexError: the rows are not within the tensor.
            CheckpointError: as in `read`.
        """
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}:{stop} of a tensor of shape {self.shape}")
        return self._readable(start, stop)

    def _readable(self, start: int, stop: int) -> NDArray[Any]:
        if self.dtype not in READABLE:
            raise CheckpointError(
                f"a tensor of dtype {self.dtype} cannot be read; use a checkpoint in bfloat16, float16 or "
                "float32"
            )
        return self._rows(start, stop)

    @abstractmethod
    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows of a readable tensor; a scalar is one row."""


class Checkpoint(Mapping[str, TensorHandle]):
    """Tensor handles by name.

    Attributes:
        source: path or ``hf://`` address.
        metadata: what the file says besides tensors, as plain data (see each reader).
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorHandle],
        *,
        source: str,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self.source = source
        self.metadata = dict(metadata or {})

    def __getitem__(self, name: str) -> TensorHandle:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<Checkpoint of {len(self)} tensors from {self.source}>"


def select(checkpoint: Checkpoint, rename: Callable[[str], str | None]) -> Checkpoint:
    """A view of a checkpoint under other names; nothing is read.

    Args:
        checkpoint: tensors to choose from.
        rename: new name of a tensor, or None to leave it out.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    origin: dict[str, str] = {}
    for name in checkpoint:
        new = rename(name)
        if new is None:
            continue
        if new in origin:
            raise CheckpointError(
                f"{checkpoint.source} holds '{origin[new]}' and '{name}', which both mean '{new}'; "
                "use a checkpoint of a single model"
            )
        origin[new] = name
    tensors = {new: checkpoint[name] for new, name in origin.items()}
    return Checkpoint(tensors, source=checkpoint.source, metadata=checkpoint.metadata)
