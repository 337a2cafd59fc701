"""The rows of a step as plain tuples."""

from __future__ import annotations

from typing import NamedTuple

from diagd.schedule import Table


class Row(NamedTuple):
    """One fed token: position of the token whose id is fed, position it is fed at, cell it decodes or -1."""

    source: int
    position: int
    sink: int


def rows_of(table: Table) -> list[list[Row]]:
    """The rows of every step of a table."""
    steps = (table.step(n) for n in range(table.steps))
    return [
        [Row(*row) for row in zip(s.sources.tolist(), s.positions.tolist(), s.sinks.tolist(), strict=True)]
        for s in steps
    ]
