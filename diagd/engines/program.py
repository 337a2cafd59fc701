"""A step graph bound to fixed addresses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """A tensor at a fixed address; -n in ``shape`` is n times the width of the step."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def at_width(self, width: int) -> tuple[int, ...]:
        """Its shape in a step of ``width`` rows."""
        return tuple(-length * width if length < 0 else length for length in self.shape)

    def part(self, lane: int, streams: int, width: int) -> int:
        """Where the part of one of the streams that share it begins, in a step of ``width`` rows."""
        return self.address + lane * (math.prod(self.at_width(width)) // streams) * self.dtype.itemsize


class Program(Protocol):
    """A compiled step graph.

    ``capturable``: what it queues can be recorded into a graph of the device.
    """

    capturable: bool

    def enqueue(self, width: int) -> None:
        """Queue one step of ``width`` rows."""
        ...


MakeProgram = Callable[[Mapping[str, Tensor]], Program]
"""Binds a graph to tensors by name; names the graph does not have are ignored."""
