"""``diagd models``: what can be exported."""

from __future__ import annotations

from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.options import checked, flag

COLUMNS = ("model", "parameters", "grid", "context")


@checked
class ModelsOptions:
    """How to list them."""

    json: bool = flag("machine-readable", False)


def run(options: ModelsOptions) -> None:
    """Print the table of models."""
    from diagd.export.families import listing

    rows = listing()
    if options.json:
        terminal.print_json(rows)
        return
    console = terminal.console()
    terminal.print_table(console, COLUMNS, ([_cell(row[name]) for name in COLUMNS] for row in rows), "models")
    for row in rows:
        console.print(f"{row['model']}: weights {row['weights']}; licence: {row['licence']}")


def _cell(value: object) -> str:
    if not isinstance(value, int):
        return str(value)
    return f"{value / 1e9:.2f} billion" if value >= 1e9 else f"{value / 1e6:.1f} million"


VERB = Verb(ModelsOptions, run, "example:\n  diagd models\n", prints=True)
