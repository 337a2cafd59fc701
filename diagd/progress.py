"""Progress of long work on the terminal; silent elsewhere, and unless a console is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
        if self._console is None or not self._console.is_terminal:  # bars would leave blank lines in a file
            yield lambda _: None
            return
        from rich import progress

        shown = progress.TextColumn("{task.description}", markup=False), progress.BarColumn()
        kinds = [getattr(progress, name)() for name in columns]
        with progress.Progress(*shown, *kinds, console=self._console, transient=True) as bars:
            task = bars.add_task(title, total=total)
            yield lambda amount: bars.advance(task, amount)
