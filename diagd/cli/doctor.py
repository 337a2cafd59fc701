"""``diagd doctor``: is this machine ready, and what to do where it is not."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from diagd.cli.paths import path

EPILOG = """examples:
  diagd doctor
  diagd doctor crafter-3m.diagd
  diagd doctor --json

Exit code 1 where something is wrong; what is only absent costs the features that need it.
"""

COLOURS = {"ok": "green", "problem": "red", "absent": "yellow"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=path, nargs="?", help="also check this bundle")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    """Print the checks; exit code 1 where one found a problem."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from diagd.planning.machine import PROBLEM, check_bundle, check_machine

    checks = check_machine()
    if args.bundle:
        checks += check_bundle(args.bundle)
    problems = sum(check.status == PROBLEM for check in checks)
    if args.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))  # noqa: T201
    else:
        table = Table("check", "", "found", "how to fix")
        for check in checks:
            status = f"[{COLOURS[check.status]}]{check.status}"
            table.add_row(escape(check.name), status, escape(check.found), escape(check.fix))
        Console().print(table)
    return 1 if problems else 0
