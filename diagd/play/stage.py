"""The thread that plays a game: commands, then a frame when it is due, with the newest input."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from diagd.errors import DiagdError, UsageError
from diagd.play.controls import Inputs
from diagd.play.game import Game, Shown
from diagd.play.pacer import Pacer
from diagd.play.pictures import Pictures

Mode = Literal["live", "step", "pause"]
"""Frames at the rate, a frame for each key pressed or while it is held, or none."""

MAX_COMMANDS: Final = 16
_IDLE_SECONDS: Final = 0.25


@dataclass(frozen=True)
class Update:
    """What there is to see: pictures, and the frame they are of unless the world was moved."""

    known: int
    pictures: Pictures
    shown: Shown | None = None
    began: float = 0.0


class Stage(threading.Thread):
    """Plays until it is closed.

    Args:
        game: used by this thread alone from its start on.
        inputs: of the player.
        show: takes each update, in this thread; what it takes counts to the work of a frame.
        fail: takes the text of an error that stopped the world.
        rate: frames a second.

    Attributes:
        mode: see `Mode`.
        is_watched: whether there is a player; without one nothing moves.
    """

    def __init__(
        self,
        game: Game,
        inputs: Inputs,
        show: Callable[[Update], None],
        fail: Callable[[str], None],
        rate: float,
    ) -> None:
        super().__init__(name="stage", daemon=True)
        self.game, self.inputs, self.pacer = game, inputs, Pacer(rate)
        self.mode: Mode = "live"
        self.is_watched = False
        self._show, self._fail = show, fail
        self._commands: queue.Queue[Callable[[], None]] = queue.Queue(MAX_COMMANDS)
        self._wake = threading.Event()
        self._closing = False

    def post(self, command: Callable[[], Any]) -> None:
        """Have a command run between two frames; it answers for its own errors.

        Raises:
            UsageError: too many wait.
        """
        try:
            self._commands.put_nowait(command)
        except queue.Full:
            raise UsageError(f"{MAX_COMMANDS} commands wait already; slow down") from None
        self._wake.set()

    def wake(self) -> None:
        """Something changed that may make a frame due."""
        self._wake.set()

    def close(self) -> None:
        """End after the frame that is decoded now, and close the game."""
        self._closing = True
        self._wake.set()
        if self.is_alive():
            self.join()
        self.game.close()

    def look(self, pictures: Pictures) -> None:
        """Show the world as it is after it was moved."""
        self._show(Update(self.game.known, pictures))
        self.pacer.rest()

    def run(self) -> None:
        """The loop; see the class."""
        while not self._closing:
            self._wake.clear()
            while not self._commands.empty():
                self._guard(self._commands.get_nowait())
            delay = self._delay()
            if delay:
                self._wake.wait(delay)
            elif not self._closing:
                self._guard(self._play)

    def _delay(self) -> float:
        """Seconds until something may have to be done; 0: a frame is due."""
        moves = self.mode == "live" or (self.mode == "step" and self.inputs.is_active)
        if not (moves and self.is_watched):
            self.pacer.rest()
            return _IDLE_SECONDS
        return 0.0 if self.inputs.has_changed else self.pacer.delay()

    def _play(self) -> None:
        began = time.perf_counter()
        self.pacer.tick()
        shown = self.game.advance(self.inputs.take, self.inputs.newer)
        assert shown is not None
        self._show(Update(self.game.known, shown.pictures, shown, began))
        self.pacer.add(time.perf_counter() - began)

    def _guard(self, work: Callable[[], None]) -> None:
        """Run, and on an error stand still and say why."""
        try:
            work()
        except DiagdError as error:
            self.mode = "pause"
            self._fail(str(error))
        except OSError as error:  # a disk that is full, of a video that is written
            self.mode = "pause"
            self._fail(error.strerror or str(error))
        except Exception as error:
            self.mode = "pause"
            self._fail(f"internal error: {type(error).__name__}")
