"""Progress of long work on the terminal; silent elsewhere, and unless a console is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")


def started() -> int:
    """How many processes torchrun started for this work; 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process tells of the work and writes what comes of it."""
    return started() == 1 or os.environ.get("RANK", "0") == "0"


class Progress:
    """Bars on a console, or nothing.

    Args:
        console: rich console for the bars; None keeps quiet.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console

    @contextmanager
    def bytes(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar in bytes with its rate; yields the function that advances it."""
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        name = TextColumn("{task.description}", markup=False)
        with self._bar(title, total, name, BarColumn(), *columns) as advance:
            yield advance

    @contextmanager
    def count(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar in items."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

        columns = (MofNCompleteColumn(), TimeElapsedColumn())
        name = TextColumn("{task.description}", markup=False)
        with self._bar(title, total, name, BarColumn(), *columns) as advance:
            yield advance

    def each(self, items: Sequence[Item], title: str) -> Iterable[Item]:
        """Iterate with a bar."""
        with self.count(title, len(items)) as advance:
            for item in items:
                yield item
                advance(1)

    @contextmanager
    def task(self, title: str) -> Iterator[None]:
        """A spinner for work whose length is not known."""
        from contextlib import nullcontext

        with self._console.status(title) if self._console else nullcontext():
            yield

    @contextmanager
    def _bar(self, title: str, total: int, *columns: object) -> Iterator[Callable[[int], None]]:
        if self._console is None or not self._console.is_terminal:  # bars would leave blank lines in a file
            yield lambda _: None
            return
        from rich.progress import Progress as Bars

        with Bars(*columns, console=self._console, transient=True) as bars:  # type: ignore[arg-type]
            task = bars.add_task(title, total=total)
            yield lambda amount: bars.advance(task, amount)
