"""Worlds that are played, and the thread that plays them: commands, then frames when they are due."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from typing_extensions import override

from diagd.engines.host import exact_waits
from diagd.errors import DiagdError, UsageError
from diagd.play.controls import Inputs
from diagd.play.game import Game, Shown
from diagd.play.pictures import Pictures
from diagd.runtime.step import Due, Run, lock_step

KEPT: Final = 120
"""Frames that figures are of."""

SHARE: Final = 0.9
"""Of what the slowest frame in twenty allows: a rate that is kept looks better than one that is not."""


class Pacer:
    """Ticks at the rate that was ``asked`` for, in frames a second, or at one that can be kept.

    What is missed is not made up for; ``late`` counts it.
    """

    def __init__(self, asked: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.asked, self.late = asked, 0
        self._clock = clock
        self._work: deque[float] = deque(maxlen=KEPT)
        self._shown: deque[float] = deque(maxlen=KEPT)
        self._next = clock()

    @property
    def rate(self) -> float:
        """Frames a second that are aimed at."""
        slow = self.percentile(95)
        return min(self.asked, SHARE / slow) if slow else self.asked

    @property
    def fps(self) -> float:
        """Frames a second that were shown, of late."""
        shown = self._shown
        return (len(shown) - 1) / (shown[-1] - shown[0]) if len(shown) > 1 and shown[-1] > shown[0] else 0.0

    def percentile(self, share: float) -> float:
        """Seconds of work that ``share`` per cent of the last frames took, or less; one of few apart."""
        return float(np.percentile(self._work, share, method="lower")) if self._work else 0.0

    def delay(self) -> float:
        """Seconds until the next frame is due."""
        return max(0.0, self._next - self._clock())

    def tick(self) -> None:
        """A frame begins, when it is due or before; the next is due a period later."""
        now, period = self._clock(), 1 / self.rate
        if now - self._next > period:
            self.late += 1
            self._next = now
        self._next = min(self._next, now) + period

    def rest(self) -> None:
        """Nothing was due for a while."""
        self._next = self._clock()
        self._shown.clear()

    def add(self, seconds: float) -> None:
        """A frame was shown that took so much work."""
        self._work.append(seconds)
        self._shown.append(self._clock())


Mode = Literal["live", "step", "pause"]
"""Frames at the rate, a frame for each key pressed or while it is held, or none."""

MAX_COMMANDS: Final = 16
_IDLE_SECONDS: Final = 0.25
_SLACK: Final = 0.5
"""Of a period: a frame that is due so soon is decoded with one that is due."""


Show = Callable[[Pictures, Shown | None], None]
"""Takes the pictures there are to see, and the frame they are of unless the world was moved."""


class Stage:
    """A world that is played: commands to it, and frames when they are due.

    The game loop's thread alone uses the game from its start on. ``show`` is called there, as part of the
    work of a frame, and ``fail`` with the text of an error that stopped the world. Nothing moves unless it
    ``is_watched``; ``wake`` is called when something may have made a frame due; ``frames`` counts them.
    """

    def __init__(
        self, game: Game, inputs: Inputs, show: Show, fail: Callable[[str], None], rate: float
    ) -> None:
        self.game, self.inputs, self.pacer = game, inputs, Pacer(rate)
        self.mode: Mode = "live"
        self.is_watched, self.frames = False, 0
        self.wake: Callable[[], object] = lambda: None
        self._show, self._fail = show, fail
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def post(self, command: Callable[[], Any], *, always: bool = False) -> None:
        """Have a command run between two frames; it answers for its own errors.

        Raises:
            UsageError: too many wait, and it is not to be run ``always``.
        """
        if not always and self._commands.qsize() >= MAX_COMMANDS:
            raise UsageError(f"{MAX_COMMANDS} commands wait already; slow down")
        self._commands.put(command)
        self.wake()

    def look(self, pictures: Pictures) -> None:
        """Show the world as it is after it was moved."""
        self.game.watch(pictures)
        self._show(pictures, None)
        self.pacer.rest()

    def obey(self) -> None:
        """Run the commands that wait."""
        while not self._commands.empty():
            command = self._commands.get_nowait()
            try:
                command()
            except Exception as error:  # whatever it is, the world stands still and the others go on
                self.stop(error)

    def delay(self) -> float | None:
        """Seconds until the next frame is due; None: nothing moves."""
        moves = self.mode == "live" or (self.mode == "step" and self.inputs.is_active)
        if not (moves and self.is_watched):
            self.pacer.rest()
            if self.mode == "pause":
                self.inputs.pause()
            return None
        return 0.0 if self.inputs.has_changed else self.pacer.delay()

    def run(self) -> Run[None]:
        """Passes of the next frame, which is shown; an error stops the world."""
        began = time.perf_counter()
        self.pacer.tick()
        try:
            for event in self.game.play(self.inputs.take, self.inputs.newer):
                if isinstance(event, Due):
                    yield event
                else:
                    self.frames += 1
                    self.game.watch(event.pictures)
                    self._show(event.pictures, event)
                    self.pacer.add(time.perf_counter() - began)
        except Exception as error:
            self.stop(error)

    def stop(self, error: Exception) -> None:
        """Stand still and say why."""
        self.mode = "pause"
        if isinstance(error, DiagdError):
            self._fail(str(error))
        elif isinstance(error, OSError):  # a disk that is full, of a video that is written
            self._fail(error.strerror or str(error))
        else:
            self._fail(f"internal error: {type(error).__name__}")


@dataclass(frozen=True)
class Figures:
    """Of one engine.

    Attributes:
        frames, late: decoded, and ticks that were missed, so far.
        p50, p95: seconds of the passes and pictures of all, of late.
        measured: frames that these are of, since somebody was seated.
    """

    frames: int = 0
    late: int = 0
    p50: float = 0.0
    p95: float = 0.0
    measured: int = 0


class Engine(Protocol):
    """What decodes worlds in the same passes."""

    @property
    def figures(self) -> Figures:
        """What it does and takes."""

    def forget(self) -> None:
        """Another number plays: what it took before says nothing of what it takes now."""


class GameLoop(threading.Thread, Engine):
    """Plays stages until it is closed; frames that are due at about the same time share passes.

    They are over the sessions of one group, or one alone.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__(name="stage", daemon=True)
        self.stages = tuple(stages)
        self._spent: deque[float] = deque(maxlen=KEPT)  # by the passes and pictures of all
        self._wake = threading.Event()
        self._closing = False
        for stage in self.stages:
            stage.wake = self._wake.set

    @override
    @property
    def figures(self) -> Figures:
        frames = sum(stage.frames for stage in self.stages)
        late = sum(stage.pacer.late for stage in self.stages)
        p50, p95 = np.percentile(self._spent or (0.0,), (50, 95), method="lower").tolist()
        return Figures(frames, late, p50, p95, len(self._spent))

    @override
    def forget(self) -> None:
        self._spent.clear()

    def close(self) -> None:
        """End after the frames that are decoded now, and close the games."""
        self._closing = True
        self._wake.set()
        if self.is_alive():
            self.join()
        for stage in self.stages:
            stage.game.close()

    def run(self) -> None:
        """The loop; see the class."""
        with exact_waits():
            self._loop()

    def _loop(self) -> None:
        while not self._closing:
            self._wake.clear()
            watched = [stage for stage in self.stages if stage.is_watched]  # they have begun below
            for stage in self.stages:
                stage.obey()
            delays = {stage: delay for stage in watched if (delay := stage.delay()) is not None}
            delay = min(delays.values(), default=_IDLE_SECONDS)
            if delay:
                self._wake.wait(min(delay, _IDLE_SECONDS))
            elif not self._closing:
                self._play([stage for stage, later in delays.items() if later < _SLACK / stage.pacer.asked])

    def _play(self, stages: Sequence[Stage]) -> None:
        began, passes = time.perf_counter(), stages[0].game.session.passes
        runs = {stage.game.session.lane: stage.run() for stage in stages}
        try:
            for _ in lock_step(passes, runs, in_phase=False):  # each has a decoder of its own
                pass
        except Exception as error:  # of the engine, which all share
            for stage in stages:
                stage.stop(error)
        self._spent.append(time.perf_counter() - began)
