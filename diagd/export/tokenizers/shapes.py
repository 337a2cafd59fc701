"""Reading an architecture off the tensor shapes of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping

from diagd.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


def shape_of(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    """Shape of one tensor.

    Raises:
        CheckpointError: the tensor is absent or has another number of dimensions.
    """
    found = shapes.get(name)
    if found is None:
        raise CheckpointError(
            f"the checkpoint has no tensor '{name}', from which the tokenizer is sized; "
            f"it holds {len(shapes)} others; is it a file of this tokenizer?"
        )
    if len(found) != rank:
        raise CheckpointError(f"tensor '{name}' has shape {list(found)}; expected {rank} dimensions")
    return tuple(found)


def count(shapes: Shapes, prefix: str) -> int:
    """Number of consecutive indices N = 0, 1, ... for which tensors ``prefix.N.*`` exist."""
    found = {int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
    return next(index for index in range(len(found) + 1) if index not in found)
