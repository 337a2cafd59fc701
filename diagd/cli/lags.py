"""``--k 1,2``: row lags in a list."""

from __future__ import annotations

from diagd.errors import UsageError


def parse_lags(given: str) -> tuple[int, ...]:
    """Row lags of a comma-separated list.

    Raises:
        UsageError: a part is no number.
    """
    try:
        return tuple(int(part) for part in given.split(","))
    except ValueError as error:
        raise UsageError(f"--k {given}: expected row lags such as 1,2,4") from error
