"""What happened when: stages of a run on one clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple


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
