"""Passes of an engine, which the runs of sessions wait for: one for a session alone, or for many together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

from diagd.engines.engine import Engine

T = TypeVar("T")

Run: TypeAlias = Iterator[int | T]
"""A run that somebody else runs the passes of: it gives how many rows decode in the pass that it waits for,
which must have run when it goes on, and what it comes to in between."""


class Passes:
    """Runs passes of an engine, and tells what the last one took (``time.perf_counter``).

    Attributes:
        entered, left, sampled: when it began, when the engine returned, and when its tokens were drawn.
        stamps: the number of the next time stamp on the engine's clock, which gets one ahead of every pass
            and one behind it while this is not None.
    """

    def __init__(self, engine: Engine) -> None:
        self.entered = self.left = self.sampled = 0.0
        self.stamps: int | None = None
        self._engine = engine

    def run(self, lanes: Sequence[int]) -> None:
        """One pass for some lanes."""
        engine, number = self._engine, self.stamps
        self.entered = time.perf_counter()
        if number is not None:
            engine.clock.mark(number)
        engine.step(lanes)
        if number is not None:
            engine.clock.mark(number + 1)
            self.stamps = number + 2
        self.left = time.perf_counter()
        engine.draw()
        self.sampled = time.perf_counter()


def lock_step(
    passes: Passes, runs: Mapping[int, Run[T]], *, in_phase: bool = True
) -> Iterator[tuple[int, T]]:
    """What runs come to, as it comes, with the lane of each; every pass is for all that wait for one.

    Args:
        passes: of the engine.
        runs: by lane.
        in_phase: a run goes on behind a result only when no other one waits for a pass, and those that feed
            known tokens do so first: runs of one schedule then have steps of the same width. Else a run goes
            on at once, which is best where they need different numbers of passes.
    """
    waiting: dict[int, int] = {}
    resting: list[int] = []
    moving: Sequence[int] = list(runs)
    while True:
        for lane in moving:
            event = next(runs[lane], None)
            if type(event) is int:
                waiting[lane] = event
            elif event is not None:
                resting.append(lane)
                yield lane, event  # type: ignore[misc]
        if resting and not (in_phase and waiting):
            moving, resting = resting, []
        elif waiting:
            feeding = [lane for lane, rows in waiting.items() if not rows]
            moving = feeding if in_phase and feeding else list(waiting)
            passes.run(moving)
            for lane in moving:
                del waiting[lane]
        else:
            return
