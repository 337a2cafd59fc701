"""Steps as NVTX ranges, for Nsight Systems."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def nvtx_ranges(steps: Iterator[Item], widths: Iterable[int]) -> Iterator[Item]:
    """The same steps, each run within a range that says its width; without nvtx, just the steps.

    Args:
        steps: run when they are asked for.
        widths: rows of each.
    """
    if importlib.util.find_spec("nvtx") is not None:
        nvtx = importlib.import_module("nvtx")
        for width in widths:
            with nvtx.annotate(f"step w={width}"):
                step = next(steps)
            yield step
    yield from steps
