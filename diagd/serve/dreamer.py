"""The thread that dreams: one job after the other over one session, results as they come."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from diagd.engines.engine import Int
from diagd.errors import UsageError
from diagd.runtime.pixels import PixelCodec, Pixels
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session

MAX_CANCELLED: Final = 100
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Context:
    """What dreams start from; those that share one are dreamt behind one prefill.

    Attributes:
        tokens: int32 [P, rows, columns] of the known frames.
        led: int32 [P, n], actions that led to each.
        done: int32 [1 + F, n]: the action at the last of them, then those that replace the model's own at the
            frames to come.
        settings: of the sampler.
        steps: frames that are dreamt.
    """

    tokens: Int
    led: Int
    done: Int
    settings: SamplingSettings
    steps: int


@dataclass(frozen=True)
class Job:
    """A dream that was ordered."""

    context: Context
    seed: int
    name: str = field(default_factory=lambda: secrets.token_hex(16))


@dataclass(frozen=True)
class Dreamt:
    """A frame of a job: its picture uint8 [height, width, 3], tokens and the action int32 [n] at it."""

    job: str
    index: int
    picture: Pixels
    tokens: Int
    action: Int


class Dreamer(threading.Thread):
    """Dreams what is ordered until it is closed; then the session is closed too.

    It alone uses the session, and ``pixels`` for tokens; others use them for pictures. ``most`` jobs may
    wait, and results are kept for ``lifespan`` seconds.
    """

    def __init__(self, session: Session, pixels: PixelCodec, most: int, lifespan: float) -> None:
        super().__init__(name="dreamer", daemon=True)
        self._session, self._pixels = session, pixels
        self.most, self.lifespan = most, lifespan
        self._jobs: deque[Job] = deque()
        self._cancelled: deque[str] = deque(maxlen=MAX_CANCELLED)
        self._results: dict[str, tuple[float, list[Dreamt]]] = {}  # by job: since when, and what
        self._change = threading.Condition()
        self._closing = False

    def order(self, jobs: Sequence[Job]) -> int:
        """Queue jobs; returns how many wait then.

        Raises:
            UsageError: too many wait.
        """
        with self._change:
            self._forget()
            if len(self._jobs) + len(jobs) > self.most:
                raise UsageError(f"{len(self._jobs)} jobs wait already, of at most {self.most}; try later")
            self._jobs.extend(jobs)
            self._change.notify()
            return len(self._jobs)

    def collect(self, names: Sequence[str]) -> list[Dreamt]:
        """What is new of some jobs; it is handed out once."""
        with self._change:
            self._forget()
            return [one for name in dict.fromkeys(names) for one in self._results.pop(name, (0, []))[1]]

    def cancel(self, name: str) -> None:
        """Dream a job no further, and drop what there is of it."""
        with self._change:
            self._cancelled.append(name)
            self._jobs = deque(job for job in self._jobs if job.name != name)
            self._results.pop(name, None)

    def close(self) -> None:
        """End after the frame that is dreamt now."""
        with self._change:
            self._closing = True
            self._change.notify()
        if self.is_alive():
            self.join()
        self._session.close()

    def run(self) -> None:
        """The loop; see the class."""
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self._jobs)
                if self._closing:
                    return
                job = self._jobs.popleft()
            try:
                self._dream(job)
            except Exception as error:  # whatever it is, the next dream is none the worse for it
                _LOG.warning("a dream was given up: %s", error)

    def _dream(self, job: Job) -> None:
        context, session = job.context, self._session
        session.start(context.tokens, context.led)
        action = context.done[0]
        for index in range(context.steps):
            if self._closing or job.name in self._cancelled:
                return
            frame = session.step(action, sampling=context.settings, seed=job.seed)
            if index + 1 < len(context.done):
                action = context.done[index + 1]
            else:
                action = session.act(sampling=context.settings, seed=job.seed)
            (picture,) = self._pixels.decode([frame.tokens])
            self._add(Dreamt(job.name, index, picture, frame.tokens, action))

    def _add(self, dreamt: Dreamt) -> None:
        with self._change:
            if dreamt.job not in self._cancelled:
                before = self._results.get(dreamt.job, (0, []))[1]
                self._results[dreamt.job] = time.monotonic(), [*before, dreamt]

    def _forget(self) -> None:
        """Drop results that nobody came for."""
        late = time.monotonic() - self.lifespan
        self._results = {name: kept for name, kept in self._results.items() if kept[0] >= late}
