"""When steps ran: by the clock of the host, or by time stamps on the stream of a device."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from diagd.engines.cuda.engine import DeviceEngine
from diagd.engines.engine import Float, SamplingState, StepInputs
from diagd.runtime.session import Session, StepTime


class StepClock(Protocol):
    """Times of the steps of one run."""

    def finished(self, count: int, refill_seconds: float) -> tuple[list[StepTime], float]:
        """The last ``count`` steps, all done by now, and what feeding the context again took beside them."""
        ...


class HostClock:
    """What the session noted: the host waits for every step."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def finished(self, count: int, refill_seconds: float) -> tuple[list[StepTime], float]:
        """See ``StepClock``."""
        last = list(itertools.islice(reversed(self._session.timing.recent), count))
        return last[::-1], refill_seconds


class DeviceClock:
    """Time stamps around every step on the device, which the host runs ahead of.

    Times of the device are set on the host's clock by a stamp that both wait for. A step's ``host`` is how
    long the device then waited for the next one.
    """

    def __init__(self, session: Session, engine: DeviceEngine) -> None:
        self._session, self._device = session, engine.device
        self._step: Callable[[StepInputs, SamplingState], Float] = engine.step
        self._refills: list[int] = []
        self._device.mark(0)
        self._device.synchronise()
        self._origin = time.perf_counter()

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """Queue one pass of the engine between two time stamps."""
        first = 2 * len(self._refills) + 1
        self._refills.append(self._session.timing.refill_steps)
        self._device.mark(first)
        logits = self._step(inputs, sampling)
        self._device.mark(first + 1)
        return logits

    def finished(self, count: int, refill_seconds: float) -> tuple[list[StepTime], float]:
        """See ``StepClock``."""
        del refill_seconds
        self._device.synchronise()
        counters = [*self._refills, self._session.timing.refill_steps]
        passes = range(len(self._refills))
        refills = [at for at in passes if counters[at + 1] > counters[at]]
        steps = [at for at in passes if counters[at + 1] == counters[at]]
        noted = list(itertools.islice(reversed(self._session.timing.recent), count))[::-1]
        times = [self._time(at, step) for at, step in zip(steps, noted, strict=True)]
        self._refills = []
        return times, sum(self._seconds(at) for at in refills)

    def _time(self, at: int, noted: StepTime) -> StepTime:
        began = self._origin + self._device.seconds(0, 2 * at + 1)
        last = at + 1 == len(self._refills)
        waited = 0.0 if last else self._device.seconds(2 * at + 2, 2 * at + 3)
        return noted._replace(began=began, engine=self._seconds(at), sampling=0.0, host=max(0.0, waited))

    def _seconds(self, at: int) -> float:
        return self._device.seconds(2 * at + 1, 2 * at + 2)


@contextmanager
def step_clock(session: Session) -> Iterator[StepClock]:
    """The clock that suits a session's engine, while the block runs."""
    engine = session.engine
    if not isinstance(engine, DeviceEngine):
        yield HostClock(session)
        return
    clock, plain = DeviceClock(session, engine), engine.step
    engine.step = clock.step  # type: ignore[method-assign]
    try:
        yield clock
    finally:
        engine.step = plain  # type: ignore[method-assign]
