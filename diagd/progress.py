"""Progress of long work: bars on a terminal, a line now and then elsewhere, nothing without a console."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

EVERY: Final = 30.0
"""Seconds between two lines of work that writes to a file."""

Item = TypeVar("Item")


def started() -> int:
    """How many processes torchrun started for this work; 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process tells of the work and writes what comes of it."""
    return started() == 1 or os.environ.get("RANK", "0") == "0"


class Progress:
    """Bars on a console of rich; without one nothing is shown."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console

    def bytes(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A bar in bytes with its rate; yields the function that advances it."""
        return self._bar(title, total, "DownloadColumn", "TransferSpeedColumn", "TimeRemainingColumn")

    def count(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A bar in items."""
        return self._bar(title, total, "MofNCompleteColumn", "TimeElapsedColumn")

    def each(self, items: Sequence[Item], title: str) -> Iterable[Item]:
        """Iterate with a bar."""
        with self.count(title, len(items)) as advance:
            for item in items:
                yield item
                advance(1)

    def task(self, title: str) -> AbstractContextManager[object]:
        """A spinner for work whose length is not known."""
        return self._console.status(title) if self._console else nullcontext()

    @contextmanager
    def _bar(self, title: str, total: int, *columns: str) -> Iterator[Callable[[int], None]]:
        if self._console is None:
            yield lambda _: None
            return
        if not self._console.is_terminal:  # bars would leave blank lines in a file
            yield self._lines(self._console, title, total)
            return
        from rich import progress

        shown = progress.TextColumn("{task.description}", markup=False), progress.BarColumn()
        kinds = [getattr(progress, name)() for name in columns]
        with progress.Progress(*shown, *kinds, console=self._console, transient=True) as bars:
            task = bars.add_task(title, total=total)
            yield lambda amount: bars.advance(task, amount)

    def _lines(self, console: Console, title: str, total: int) -> Callable[[int], None]:
        done, told = 0, time.monotonic()

        def advance(amount: int) -> None:
            nonlocal done, told
            done += amount
            if time.monotonic() - told >= EVERY:
                told = time.monotonic()
                console.print(f"{title}: {min(done / total, 1.0):.0%}")  # a gate may take more than it says

        return advance
