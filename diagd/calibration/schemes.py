"""The schemes: one table drives the command line, the search and the graphs."""

from __future__ import annotations

from dataclasses import dataclass

from diagd.bundle.precision import PRECISIONS
from diagd.errors import unknown

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


def _scheme(name: str, activation: str | None, needs_statistics: bool, floor: float) -> Scheme:
    precision = PRECISIONS[name]
    return Scheme(name, precision.summary, precision.kind, activation, needs_statistics, floor)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        _scheme("int8", "static", True, 20),
        _scheme("int8-dynamic", "row", False, 20),
        _scheme("int8-weight", None, False, 30),
        _scheme("int4-weight", None, False, 12),
        _scheme("fp8", "static", True, 20),
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
