"""The schemes: one table drives the command line, the search and the graphs."""

from __future__ import annotations

from dataclasses import dataclass

from diagd.errors import unknown

GROUP = 128
"""Inputs that share one scale in a 4-bit weight."""

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Scheme:
    """How weights and activations are stored.

    Attributes:
        name: also the precision of the graphs.
        summary: for help and documentation.
        weight: ``int8`` and ``fp8`` have a scale for each column, ``int4`` one for each group and column.
        activation: ``static`` has one scale found by calibration, ``row`` one for each row found in the
            graph, None stays in floating point.
        needs_statistics: whether a calibration run comes first.
        floor: signal to noise of a layer's product, dB, below which it stays in floating point.
    """

    name: str
    summary: str
    weight: str
    activation: str | None
    needs_statistics: bool
    floor: float


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", "8-bit weights and activations, scales from calibration", "int8", "static", True, 20),
        Scheme("int8-dynamic", "8-bit weights, activations scaled row by row", "int8", "row", False, 20),
        Scheme("int8-weight", "8-bit weights", "int8", None, False, 30),
        Scheme("int4-weight", f"4-bit weights in groups of {GROUP}", "int4", None, False, 12),
        Scheme("fp8", "E4M3 weights and activations, for GPUs from sm_89", "fp8", "static", True, 20),
    )
}


def find_scheme(name: str) -> Scheme:
    """The scheme of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in SCHEMES:
        raise unknown("precision", name, SCHEMES)
    return SCHEMES[name]
