"""Values inside a step that become outputs of its graph: inputs of products, and K/V rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diagd.export.cache_rows import CacheRows


class Watched:
    """Values inside a step that become further outputs of its graph.

    Args:
        names: of the values, in the order of the outputs.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self._values: dict[str, Tensor] = {}

    def note(self, name: str, value: Tensor) -> None:
        """Take a value."""
        self._values[name] = value

    def outputs(self) -> list[Tensor]:
        """The values of the step that ran last."""
        return [self._values[name] for name in self.names]


class WatchedMatrix(nn.Module):
    """A matrix, as ``plain``, whose input is noted.

    Args:
        name: of the matrix.
        shape: [inputs, outputs].
        dtype: of its elements.
        seen: takes the input.
    """

    def __init__(self, name: str, shape: tuple[int, int], dtype: torch.dtype, seen: Watched) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        self._name, self._seen = name, seen

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., inputs] times the matrix."""
        self._seen.note(self._name, x)
        return x @ self.plain


class WatchedRows(CacheRows):
    """Rows as they are, which are noted.

    Args:
        seen: takes the rows by name of their buffer.
    """

    def __init__(self, seen: Watched) -> None:
        super().__init__()
        self._seen = seen

    def store(self, name: str, rows: Tensor) -> Tensor:
        """Note the rows; see ``CacheRows.store``."""
        self._seen.note(name, rows)
        return rows
