"""``--k``, ``--d`` and ``--seed-policy``: a schedule on top of a bundle's own."""

from __future__ import annotations

import argparse

from diagd.bundle import Manifest
from diagd.errors import UsageError
from diagd.schedule import RowSeed, Schedule, chained_lag, check_lags, steps_per_frame


def add_schedule_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a verb."""
    parser.add_argument(
        "--k", type=int, help="row lag; the number of columns is next-token (default: bundle's)"
    )
    parser.add_argument("--d", help="frame lag: serial, chained or a number (default: the bundle's)")
    parser.add_argument("--seed-policy", choices=[seed.value for seed in RowSeed], help="row seed")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def parse_schedule(
    args: argparse.Namespace, manifest: Manifest, *, refeed: bool = True, keep_seeds: bool = False
) -> Schedule:
    """The schedule asked for.

    Raises:
        UsageError: ``--d`` is no lag.
        ScheduleError: the lags cannot be decoded.
    """
    layout, default = manifest.layout, manifest.schedule
    k = default.k if args.k is None else args.k
    check_lags(layout.rows, layout.columns, k, max(1, k) * layout.rows)
    words = {
        "serial": steps_per_frame(layout.rows, layout.columns, k),
        "chained": chained_lag(layout.rows, k),
    }
    given = args.d if args.d is not None else ("serial" if args.k is not None or not default.d else default.d)
    if given not in words and not _is_number(str(given)):
        raise UsageError(f"--d {given}: expected serial, chained or a number of steps")
    seed = RowSeed(args.seed_policy) if args.seed_policy else default.row_seed
    return Schedule(
        layout, k, words[given] if given in words else int(given), seed, refeed and default.refeed, keep_seeds
    )
