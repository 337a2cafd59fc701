"""When the next frame is due, and how even the last ones were."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np

KEPT: Final = 120
"""Frames that figures are of."""

SHARE: Final = 0.9
"""Of what the slowest frame in twenty allows: a rate that is kept looks better than one that is not."""


class Pacer:
    """Ticks at the rate that was asked for, or at one that can be kept; what is missed is not made up for.

    Attributes:
        asked: frames a second.
        late: ticks that were missed.
    """

    def __init__(self, asked: float, clock: Callable[[], float] = time.monotonic) -> None:
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
    def measured(self) -> int:
        """Frames that figures are of."""
        return len(self._work)

    @property
    def fps(self) -> float:
        """Frames a second that were shown, of late."""
        shown = self._shown
        return (len(shown) - 1) / (shown[-1] - shown[0]) if len(shown) > 1 and shown[-1] > shown[0] else 0.0

    def percentile(self, share: float) -> float:
        """Seconds of work that ``share`` per cent of the last frames took less than."""
        return float(np.percentile(self._work, share)) if self._work else 0.0

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
