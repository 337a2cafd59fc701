"""The precisions of step graphs: one table that export, calibration and plans take their names from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Precision:
    """How a step graph stores its matrices and its K/V rows.

    Attributes:
        kind: element type of the matrices; ``int8`` and ``fp8`` have a scale for each column, ``int4`` has
            one for each group and column.
        weight: bytes of a weight, its share of the scales included.
        floor: signal to noise of a product, dB, below which calibration leaves it in floating point.
        scaling: of rounded activations: ``static`` has one scale found by calibration, ``row`` one for each
            row found in the graph; None: they stay in floating point.
        cache: bytes of a K/V element.
    """

    name: str
    kind: str
    weight: float
    floor: float = 0.0
    scaling: str | None = None
    cache: float = 2.0

    @property
    def activation(self) -> float:
        """Bytes of a number that is computed with: at least half precision."""
        return max(self.cache, 2.0)


GROUP: Final = 128
"""Inputs that share one scale in a 4-bit weight."""

PRECISIONS: Final = {
    precision.name: precision
    for precision in (
        Precision("fp32", "float32", 4.0, cache=4.0),
        Precision("fp16", "float16", 2.0),
        Precision("int8", "int8", 1.0, 20, "static"),
        Precision("int8-dynamic", "int8", 1.0, 20, "row"),
        Precision("int8-weight", "int8", 1.0, 30),
        Precision("int4-weight", "int4", 0.53, 12),
        Precision("fp8", "fp8", 1.0, 20, "static"),  # E4M3, for GPUs from sm_89
    )
}

FLOATING: Final = tuple(p.name for p in PRECISIONS.values() if p.kind.startswith("float"))
"""Precisions that are exported; the others are made from those by calibration."""

KV_CACHES: Final = {"int8": 1.0}
"""Bytes of an element of a quantised K/V cache, by its type."""
