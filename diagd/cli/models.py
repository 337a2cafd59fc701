"""``diagd models``: what can be exported."""

from __future__ import annotations

import argparse
import json

from diagd.cli import terminal

COLUMNS = ("model", "parameters", "grid", "context")

EPILOG = """example:
  diagd models
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    """Print the table of models."""
    from rich.table import Table

    from diagd.export.families.registry import listing

    rows = listing()
    if args.json:
        print(json.dumps(rows, indent=2))  # noqa: T201
        return 0
    table = Table(*COLUMNS, title="models")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in COLUMNS))
    console = terminal.console()
    console.print(table)
    for row in rows:
        console.print(f"{row['model']}: weights {row['weights']}; licence: {row['licence']}")
    return 0


def _cell(value: object) -> str:
    if not isinstance(value, int):
        return str(value)
    return f"{value / 1e9:.2f} billion" if value >= 1e9 else f"{value / 1e6:.1f} million"
