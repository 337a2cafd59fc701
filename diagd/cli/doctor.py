"""``diagd doctor``: is this machine ready, and what to do where it is not."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from diagd.cli import terminal
from diagd.cli.paths import path

EPILOG = """examples:
  diagd doctor
  diagd doctor crafter-3m.diagd
  diagd doctor --json
  diagd doctor --clear-cache

Exit code 1 where something is wrong; what is only absent costs the features that need it.
"""

COLOURS = {"ok": "green", "problem": "red", "absent": "yellow"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=path, nargs="?", help="also check this bundle")
    parser.add_argument("--clear-cache", action="store_true", help="empty this machine's cache first")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    """Print the checks; exit code 1 where one found a problem."""
    from rich.table import Table

    from diagd.bundle.cache import clear
    from diagd.profiling.doctor import PROBLEM, check_bundle, check_machine

    if args.clear_cache:
        clear()
    checks = check_machine()
    if args.bundle:
        checks += check_bundle(args.bundle)
    problems = sum(check.status == PROBLEM for check in checks)
    if args.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))  # noqa: T201
    else:
        table = Table("check", "", "found", "how to fix")
        for check in checks:
            status = terminal.styled(check.status, COLOURS[check.status])
            table.add_row(check.name, status, check.found, check.fix)
        terminal.console().print(table)
    return 1 if problems else 0
