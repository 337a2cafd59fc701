"""What a step gives back and what it took; and who runs passes, for one run or for several in lock step."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias, TypeVar

from numpy.typing import NDArray

from diagd.engines.engine import Engine, Float, Int
from diagd.errors import UsageError

RECENT_STEPS: Final = 1 << 13


class StepTime(NamedTuple):
    """One step: when it began (``time.perf_counter``), its size, and the seconds of its parts.

    ``rows`` are fed, ``decoded`` of them predict a cell, ``live`` slots are in use. ``engine`` is what it
    took to run, or, on a device that runs behind the host, to queue; a pass that several sessions share
    counts to each. ``host`` is what is neither in the engine nor in the sampler of the host; work for a whole
    block counts to its first step.
    """

    began: float
    rows: int
    decoded: int
    live: int
    engine: float
    sampling: float
    host: float

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return self.engine + self.sampling + self.host


class PassTime(NamedTuple):
    """When a pass began, when the engine returned, and when its tokens were drawn (``time.perf_counter``)."""

    entered: float
    left: float
    sampled: float


@dataclass
class Timing:
    """Seconds inside and outside the engine over all steps, and the last steps one by one.

    Passes that feed a slid context again are counted by themselves, as ``refill_steps`` and
    ``refill_seconds``.
    """

    steps: int = 0
    engine: float = 0.0
    host: float = 0.0
    refill_steps: int = 0
    refill_seconds: float = 0.0
    recent: deque[StepTime] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def add(self, began: float, sizes: Sequence[tuple[int, int, int]], times: Sequence[PassTime]) -> StepTime:
        """Count steps that ran one after another, and give the last; ``sizes``: rows, decoded, live."""
        for size, (entered, left, sampled) in zip(sizes, times, strict=True):
            step = StepTime(began, *size, left - entered, sampled - left, entered - began)
            self.engine, self.host = self.engine + step.engine, self.host + step.host + step.sampling
            self.recent.append(step)
            began = sampled
        self.steps += len(times)
        return self.recent[-1]

    def add_refill(self, steps: int, seconds: float) -> None:
        """Count passes that fed a context again."""
        self.refill_steps += steps
        self.refill_seconds += seconds

    def since(self, before: Timing) -> Timing:
        """What came to it since it was as ``before``; no steps one by one."""
        return Timing(
            self.steps - before.steps,
            self.engine - before.engine,
            self.host - before.host,
            self.refill_steps - before.refill_steps,
            self.refill_seconds - before.refill_seconds,
        )


@dataclass(frozen=True)
class Frame:
    """A decoded frame.

    Attributes:
        index: in the stream.
        tokens: int32 [rows, columns].
        steps: passes since the frame before.
        seconds: likewise, ``refill_seconds`` included.
        exact: it is what next-token prediction draws behind the frames before it with the same seed.
        action: int32 [n], the known tokens that led to it, given or decoded.
        refill_steps: further passes that fed the context again because it slid.
        refill_seconds: what they took.
    """

    index: int
    tokens: Int
    steps: int
    seconds: float
    exact: bool
    action: Int
    refill_steps: int = 0
    refill_seconds: float = 0.0


class Result:
    """What one step gave; what it holds on a device is copied only when it is asked for.

    All but ``time`` is valid until the next step runs.
    """

    __slots__ = ("_engine", "_lane", "_places", "time")

    def __init__(self, engine: Engine, places: Int, time: StepTime, lane: int = 0) -> None:
        self._engine, self._places, self.time, self._lane = engine, places, time, lane

    @property
    def tokens(self) -> Int:
        """Sampled ids int32 [R] of the rows that decode a cell, in slot order."""
        return self._engine.read_tokens(self._places, self._lane)

    @property
    def logits(self) -> Float:
        """Their logits [R, V]."""
        return self._engine.logits(self._lane)

    @property
    def watched(self) -> Mapping[str, NDArray[Any]]:
        """Further outputs of the graph, where the engine was opened to watch some."""
        return self._engine.watched()


class Due:
    """The passes that a run waits for, one after another.

    Attributes:
        draws: rows that decode in each.
        times: of those that have run.
        check: refuses (UsageError) to run more where the run was overtaken.
    """

    __slots__ = ("check", "draws", "times")

    def __init__(self, draws: Sequence[int], check: Callable[[], None]) -> None:
        self.draws, self.check = draws, check
        self.times: list[PassTime] = []

    @property
    def feeds(self) -> bool:
        """Whether the next pass decodes nothing."""
        return not self.draws[len(self.times)]

    @property
    def is_over(self) -> bool:
        """All have run."""
        return len(self.times) == len(self.draws)


T = TypeVar("T")

Run: TypeAlias = Iterator[Due | T]
"""A run that somebody else runs the passes of: it gives those that must have run when it goes on, and what it
comes to in between."""


class Passes:
    """Runs passes of an engine.

    Whatever else is done with the engine is done in a ``with`` statement over it: the engine stays open.

    Attributes:
        turn: of a thread, which has it from one event of a run to the next.
        held: by the thread that uses the engine, which is not closed meanwhile; never for what callers give.
        stamps: the number of the next time stamp on the engine's clock, which gets one ahead of every pass
            and one behind it while this is not None.
        closed: whether the engine is.
    """

    def __init__(self, engine: Engine) -> None:
        self.stamps: int | None = None
        self.turn, self.held = threading.RLock(), threading.RLock()
        self.closed = False
        self._engine, self._process = engine, os.getpid()

    def __enter__(self) -> None:
        self.held.acquire()
        try:
            self.check_open()
        except UsageError:
            self.held.release()
            raise

    def __exit__(self, *error: object) -> None:
        self.held.release()

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "a session cannot be copied or sent to another process: open one there with diagd.load, and "
            "send session.stream.snapshot(), which another session's stream.restore() goes on with"
        )

    def check_open(self) -> None:
        """Refuse (UsageError) to use what is closed, or where the engine's threads are not."""
        if self.closed:
            raise UsageError("the session is closed; open another one with diagd.load")
        if self._process != os.getpid():
            raise UsageError(
                "the session was opened before this process was forked, and its threads are not here; open "
                "it in the process that uses it, or start processes by spawn"
            )

    def run(self, lanes: Sequence[int]) -> PassTime:
        """One pass for some lanes."""
        engine, number = self._engine, self.stamps
        with self:
            entered = time.perf_counter()
            if number is not None:
                engine.clock.mark(number)
            engine.step(lanes)
            if number is not None:
                engine.clock.mark(number + 1)
                self.stamps = number + 2
            left = time.perf_counter()
            engine.draw()
            return PassTime(entered, left, time.perf_counter())

    def close(self) -> None:
        """Close the engine, behind what another thread does with it: a pass writes to the engine's memory."""
        with self.held:
            if not self.closed:
                self.closed = True
                self._engine.close()


def lock_step(
    passes: Passes, runs: Mapping[int, Run[T]], *, in_phase: bool = True
) -> Iterator[tuple[int, T]]:
    """What runs come to, as it comes, with the lane of each; every pass is for all that wait for one.

    ``in_phase``, a run goes on behind a result only when no other one waits for a pass, and those that feed
    known tokens do so first: runs of one schedule then have steps of the same width. Else it goes on at once,
    which is best where runs need different numbers of passes.
    """
    waiting: dict[int, Due] = {}
    resting: list[int] = []
    moving: Sequence[int] = list(runs)
    while True:
        for lane in moving:
            event = next(runs[lane], None)
            if isinstance(event, Due):
                waiting[lane] = event
            elif event is not None:
                resting.append(lane)
                yield lane, event
        if resting and not (in_phase and waiting):
            moving, resting = resting, []
        elif waiting:
            feeding = [lane for lane, due in waiting.items() if due.feeds] if in_phase else []
            lanes = feeding or list(waiting)
            for lane in lanes:
                waiting[lane].check()
            spent = passes.run(lanes)
            for lane in lanes:
                waiting[lane].times.append(spent)
            moving = [lane for lane in lanes if waiting[lane].is_over]
            for lane in moving:
                del waiting[lane]
        else:
            return
