"""How much memory a build and an engine take, told before the first minute is spent."""

from __future__ import annotations

from dataclasses import dataclass

from diagd.bundle import Bundle
from diagd.bundle.manifest import StepGraph
from diagd.engines import host
from diagd.errors import EngineError

BUILD_BASE_BYTES = 500_000_000
"""TensorRT's builder itself, before any weight."""

BUILD_COPIES = 4
"""Copies of the weights alive at the peak of a build, for each copy in the plan."""

PLAN_COPIES = 2
"""Copies of the weights in a plan of several widths: width 1 has matrix-vector kernels and its own layout."""

# All three are measured: mineworld-300m in float16 under TensorRT-RTX 1.7, 0.64 GB of weights, takes 2.9 GB
# at widths 16 and 64 (plan 0.67 GB) and 4.7 GB at widths 1, 16 and 64 (plan 1.30 GB).


def build_bytes(weights: float) -> float:
    """Host memory at the peak of a build, for so many bytes of weights in the plan."""
    return BUILD_BASE_BYTES + BUILD_COPIES * weights


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes.

    Attributes:
        weights: of one copy of the step graph's weights.
        cache: K/V buffers.
        plan_copies: copies of the weights in the plan.
    """

    weights: int
    cache: int
    plan_copies: int

    @property
    def build(self) -> int:
        """Host memory at the peak of a build."""
        return int(build_bytes(self.plan_copies * self.weights))

    @property
    def run(self) -> int:
        """Device memory of a running engine, activations not counted."""
        return self.plan_copies * self.weights + self.cache


def estimate(bundle: Bundle, graph: StepGraph, widths: tuple[int, ...]) -> MemoryEstimate:
    """Memory for one step graph of a bundle, compiled for some widths."""
    cache = bundle.manifest.cache
    slots = 2 * cache.layers * cache.kv_heads * int(graph.capacity or 0)
    row_bytes = cache.head_size * bundle.manifest.cache_dtype(graph).itemsize
    return MemoryEstimate(
        graph.weights.bytes, slots * row_bytes, PLAN_COPIES if len(widths) > 1 and min(widths) == 1 else 1
    )


def check_memory(needed: MemoryEstimate, available: int | None) -> None:
    """Refuse a build that would be killed half way.

    Raises:
        EngineError: less is available than the estimate.
    """
    host.check_memory(
        needed.build,
        available,
        f"building an engine of {needed.weights / 1e9:.1f} GB of weights",
        "close other programs, add swap, leave width 1 out of --widths, or use --force to try anyway",
        EngineError,
    )
