"""Side-by-side measurements."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console

from diagd.bundle.targets import file_target
from diagd.errors import UsageError

CONSOLE = Console(width=120)


def parser(description: str | None, bundle: str | None = None) -> argparse.ArgumentParser:
    """The command line of a benchmark: its module's docstring, and where it needs one, a bundle's name."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if bundle is not None and bundle.startswith("-"):
        made.add_argument(bundle, type=Path, required=True)
    elif bundle is not None:
        made.add_argument(bundle, type=Path)
    return made


def markdown_table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = chain([heads, ["---"] * len(heads)], rows)
    return ["| " + " | ".join(map(str, row)) + " |" for row in lines]


def check_result(options: argparse.ArgumentParser, path: Path | None, begins: bytes) -> None:
    """Leave, with the reason, where a file of results would take another one's place or cannot be written."""
    if path is not None:
        try:
            file_target(path, (path.suffix,), "result", begins)
        except UsageError as error:
            options.error(str(error))
