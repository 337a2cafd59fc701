"""Work on many items by several workers, whose results do not depend on how many there are."""

from __future__ import annotations

import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from typing import Any, Final, Generic, TypeVar

from typing_extensions import Self, override

from diagd.errors import UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")

Make = Callable[[], Callable[[Item], Result]]
"""Gets a worker ready, once, and gives what does an item, as a function of that item alone."""

MAX_DEATHS: Final = 3
"""Workers that may be killed one after the other without a result in between."""

_HAS_MASKS: Final = hasattr(signal, "pthread_sigmask")


class Workers(ABC, Generic[Item, Result]):
    """Does items, wherever; to be closed, as by ``with``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def map(self, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Number and result of each item, as they come. A worker that is killed is replaced.

        Raises:
            DiagdError: of an item; or workers are killed again and again.
        """

    @abstractmethod
    def close(self) -> None:
        """End the workers."""


class Worker(Generic[Item, Result]):
    """One of them; an error in getting ready is that of its first item."""

    def __init__(self, make: Make[Item, Result]) -> None:
        self._make = make
        self._work: Callable[[Item], Result] | None = None

    def do(self, item: Item) -> Result:
        """One item."""
        if self._work is None:
            self._work = self._make()
        return self._work(item)


class Here(Workers[Item, Result]):
    """One worker: this process."""

    def __init__(self, make: Make[Item, Result]) -> None:
        self._worker = Worker(make)

    @override
    def map(self, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        yield from enumerate(map(self._worker.do, items))

    def close(self) -> None:
        """Nothing is held."""


class Processes(Workers[Item, Result]):
    """Workers that are processes of this machine."""

    def __init__(self, make: Make[Item, Result], count: int) -> None:
        self._make, self._count = make, count
        self._executor = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._count, get_context("spawn"), _begin, (self._make,))

    @override
    def map(self, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        missing, deaths = dict(enumerate(items)), 0
        while missing:
            try:
                for number, result in self._map(missing):
                    del missing[number]
                    deaths = 0
                    yield number, result
            except BrokenProcessPool as error:
                deaths += 1
                if deaths == MAX_DEATHS:
                    raise too_many_deaths(self._count) from error
                self._executor.shutdown()
                self._executor = self._start()

    def _map(self, items: dict[int, Item]) -> Iterator[tuple[int, Result]]:
        with starting():
            running = {self._executor.submit(_do, item): number for number, item in items.items()}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            for future in running:
                future.cancel()

    @override
    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


_own: Worker[Any, Any] | None = None
"""Of a process of `Processes`."""


def _begin(make: Make[Any, Any]) -> None:
    global _own  # noqa: PLW0603  # all that is left of one call in the next
    _own = Worker(make)
    end_with_owner()


@contextmanager
def starting() -> Iterator[None]:
    """Let Ctrl-C wait while processes of a pool start: they inherit that, until they `end_with_owner`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if _HAS_MASKS else set()
    try:
        yield
    finally:
        if _HAS_MASKS:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_owner() -> None:
    """Have this process of a pool end with whoever waits for its results, where it would wait for ever.

    Ctrl-C, which all of them get, is for the owner to tell of.
    """
    owner = parent_process()
    assert owner is not None
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _HAS_MASKS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_outlive, args=(owner,), daemon=True).start()


def _outlive(owner: BaseProcess) -> None:
    owner.join()
    os._exit(1)


def _do(item: Any) -> Any:
    assert _own is not None
    return _own.do(item)


def too_many_deaths(count: int) -> UsageError:
    """Workers do not live."""
    return UsageError(
        f"{MAX_DEATHS} workers were killed one after the other, mostly for want of memory; use fewer than "
        f"{count} --workers, or the same command again to go on"
    )
