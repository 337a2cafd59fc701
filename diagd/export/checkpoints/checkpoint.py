"""Named tensors that have not been read yet: shape and dtype at once, values row by row when asked."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from diagd.errors import CheckpointError

Shape = tuple[int, ...]

WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")
READABLE = {*WEIGHT_DTYPES, "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}

_LINES_PER_KIND = 12


@dataclass(frozen=True)
class TensorHandle(ABC):
    """A tensor of a checkpoint; ``dtype`` is a name such as ``float32``, ``float16`` or ``bfloat16``."""

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
        return self._readable(0, self.shape[0] if self.shape else 1).reshape(self.shape)

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


class Checkpoint(dict[str, TensorHandle]):
    """Tensor handles by name.

    Attributes:
        source: path or ``hf://`` address.
        metadata: what the file says besides tensors, as plain data.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorHandle],
        *,
        source: str,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.source, self.metadata = source, dict(metadata or {})

    def __repr__(self) -> str:
        return f"<Checkpoint of {len(self)} tensors from {self.source}>"


def select(checkpoint: Checkpoint, rename: Callable[[str], str | None]) -> Checkpoint:
    """A view of a checkpoint under other names, None for tensors to leave out; nothing is read.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    origin: dict[str, str] = {}
    for name in checkpoint:
        if (new := rename(name)) is None:
            continue
        if new in origin:
            raise CheckpointError(
                f"{checkpoint.source} holds '{origin[new]}' and '{name}', which both mean '{new}'; "
                "use a checkpoint of a single model"
            )
        origin[new] = name
    tensors = {new: checkpoint[name] for new, name in origin.items()}
    return Checkpoint(tensors, source=checkpoint.source, metadata=checkpoint.metadata)


def check(
    checkpoint: Checkpoint, expected: Mapping[str, Shape], dtypes: Sequence[str] = WEIGHT_DTYPES
) -> None:
    """Compare names, shapes and dtypes with what a model needs; nothing is read.

    Args:
        checkpoint: tensors under the model's names (see `select`).
        expected: shape of every tensor of the model.
        dtypes: those that can be used.

    Raises:
        CheckpointError: any tensor is missing, extra, wrongly shaped or of an unusable dtype. One error
            lists them all; tensors that differ only in their numbers (layers) share a line with a count.
    """
    held = {name: (checkpoint[name], shape) for name, shape in expected.items() if name in checkpoint}
    found = {
        "missing": [(name, f"{list(shape)}") for name, shape in expected.items() if name not in held],
        "extra": [(name, f"{list(tensor.shape)}") for name, tensor in checkpoint.items() if name not in held],
        "wrong shape": [
            (name, f"expected {list(shape)}, found {list(tensor.shape)}")
            for name, (tensor, shape) in held.items()
            if tensor.shape != tuple(shape)
        ],
        "unusable dtype": [
            (name, f"expected one of {', '.join(dtypes)}, found {tensor.dtype}")
            for name, (tensor, _) in held.items()
            if tensor.dtype not in dtypes
        ],
    }
    problems = {kind: entries for kind, entries in found.items() if entries}
    if problems:
        counts = ", ".join(f"{len(entries)} {kind}" for kind, entries in problems.items())
        lines = [f"{checkpoint.source} does not fit the model: {counts}"]
        for kind, entries in problems.items():
            lines += [f"  {kind}: {line}" for line in _abbreviate(entries)]
        raise CheckpointError("\n".join([*lines, _remedy(set(problems), nothing_fits=not held)]))


def _remedy(problems: set[str], *, nothing_fits: bool) -> str:
    if nothing_fits:
        return "No expected name is there: this is another model family or another part of the model."
    if problems == {"unusable dtype"}:
        return "Use the original checkpoint, or convert these tensors to bfloat16, float16 or float32."
    return "Check that the model name and size are those of the checkpoint."


def _abbreviate(entries: Iterable[tuple[str, str]]) -> list[str]:
    """One line for all names that differ only in their numbers, at most `_LINES_PER_KIND` lines."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, detail in entries:
        groups.setdefault((re.sub(r"\d+", "*", name), detail), []).append(name)
    lines = [
        f"{names[0]} {detail}" if len(names) == 1 else f"{pattern} {detail} ({len(names)} tensors)"
        for (pattern, detail), names in groups.items()
    ]
    rest = sum(map(len, list(groups.values())[_LINES_PER_KIND:]))
    return [*lines[:_LINES_PER_KIND], *([f"... and {rest} more tensors"] if rest else [])]
