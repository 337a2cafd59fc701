"""What a step gives back, and what it took."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from numpy.typing import NDArray

from diagd.engines.engine import Engine, Float, Int

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

    def add(self, step: StepTime) -> None:
        """Count a step."""
        self.steps += 1
        self.engine += step.engine
        self.host += step.host + step.sampling
        self.recent.append(step)


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
