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
        activation: ``static`` has one scale found by calibration, ``row`` one for each row found in the
            graph, None stays in floating point.
        floor: signal to noise of a layer's product, dB, below which it stays in floating point.
    """

    name: str
    activation: str | None
    floor: float

    @property
    def weight(self) -> str:
        """``int8`` and ``fp8`` have a scale for each column, ``int4`` one for each group and column."""
        return PRECISIONS[self.name].kind

    @property
    def needs_statistics(self) -> bool:
        """Whether a calibration run comes first."""
        return self.activation == "static"


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", "static", 20),
        Scheme("int8-dynamic", "row", 20),
        Scheme("int8-weight", None, 30),
        Scheme("int4-weight", None, 12),
        Scheme("fp8", "static", 20),
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
