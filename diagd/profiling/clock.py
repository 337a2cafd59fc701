"""What happened when: stages of a run, and its steps by the host's clock or their engine's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from diagd.runtime.session import Session
from diagd.runtime.step import StepTime


class Event(NamedTuple):
    """Work of one stage: when it began (``time.perf_counter``), its seconds, and what to know of it."""

    stage: str
    began: float
    seconds: float
    details: dict[str, float]


@dataclass
class Timeline:
    """Events that do not overlap, so that the stages of a run add up to its wall time."""

    events: list[Event] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, began, time.perf_counter() - began)

    def add(self, name: str, began: float, seconds: float, **details: float) -> None:
        """Add an event that was timed elsewhere."""
        self.events.append(Event(name, began, seconds, details))

    def seconds(self) -> dict[str, list[float]]:
        """Seconds of every event, by stage, in the order of first appearance."""
        stages: dict[str, list[float]] = {}
        for event in self.events:
            stages.setdefault(event.stage, []).append(event.seconds)
        return stages


class StepClock:
    """Times of the steps of one run, asked for whenever all of them are done.

    Of an engine that runs ahead, stamps around every pass say when it began and ended; they are set on the
    host's clock by one stamp that both wait for. A step's ``host`` is then how long the engine waited for
    the next pass.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._clock = session, session.engine.clock
        self._fed = session.timing.refill_seconds
        self._steps: list[StepTime] = []
        self._stamps: list[int] = []
        self._refills: list[tuple[float, float]] = []
        if session.engine.ahead:
            self._clock.mark(0)
            self._clock.seconds(0, 0)
            self._origin = time.perf_counter()

    def add(self, step: StepTime) -> None:
        """Count the step that the session just ran, or queued."""
        if (following := self._session.passes.stamps) is not None:
            self._stamps.append(following - 2)
        elif (fed := self._session.timing.refill_seconds) > self._fed:
            self._refills.append((step.began - (fed - self._fed), fed - self._fed))
            self._fed = fed
        self._steps.append(step)

    def finished(self) -> tuple[list[StepTime], list[tuple[float, float]]]:
        """Steps since it was asked last, and when feeding the context again began and what that took."""
        steps, refills, stamps = self._steps, self._refills, self._stamps
        if self._session.passes.stamps is not None:
            steps = [self._time(at, step) for at, step in zip(stamps, steps, strict=True)]
            refills = self._passes_between(stamps)
            self._session.passes.stamps = 1
        self._steps, self._refills, self._stamps = [], [], []
        return steps, refills

    def _time(self, at: int, noted: StepTime) -> StepTime:
        last = at + 2 == self._session.passes.stamps
        waited = 0.0 if last else self._clock.seconds(at + 1, at + 2)
        taken = self._clock.seconds(at, at + 1)
        return noted._replace(began=self._began(at), engine=taken, sampling=0.0, host=max(0.0, waited))

    def _passes_between(self, stamps: list[int]) -> list[tuple[float, float]]:
        """Passes with stamps that no step has: those that fed the context again, each group as one."""
        found, expected = [], 1
        for at in stamps:
            if at > expected:
                passes = sum(self._clock.seconds(number, number + 1) for number in range(expected, at, 2))
                found.append((self._began(expected), passes))
            expected = at + 2
        return found

    def _began(self, at: int) -> float:
        return self._origin + self._clock.seconds(0, at)


@contextmanager
def step_clock(session: Session) -> Iterator[StepClock]:
    """A clock over the steps that a session runs while the block does."""
    clock = StepClock(session)
    session.passes.stamps = 1 if session.engine.ahead else None
    try:
        yield clock
    finally:
        session.passes.stamps = None
