"""``diagd models``: what can be exported."""

from __future__ import annotations

import argparse
import json

from diagd.errors import require

EPILOG = """example:
  diagd models
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    """Print the table of models."""
    require("torch", extra="export", purpose="read the models' dimensions")
    from rich.console import Console
    from rich.table import Table

    from diagd.export.families.registry import listing

    rows = listing()
    if args.json:
        print(json.dumps(rows, indent=2))  # noqa: T201
        return 0
    table = Table(*rows[0], title="models")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    return 0
