"""Progress inside a run, without work inside its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Final

from diagd.runtime.session import Session

SECONDS: Final = 0.5


@contextmanager
def watched_steps(session: Session, advance: Callable[[int], None]) -> Iterator[None]:
    """While the block runs, tell how many steps a session has run since it was told last.

    A thread looks at the session's counter now and then; a call in every step would be part of its time.
    """
    stop, before = Event(), session.timing.steps

    def look() -> None:
        seen, stopped = before, False
        while not stopped:
            stopped = stop.wait(SECONDS)
            steps = session.timing.steps
            advance(steps - seen)
            seen = steps

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
