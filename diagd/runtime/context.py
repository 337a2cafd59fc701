"""How a session's context slides when its window is full."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from diagd.bundle.manifest import AbsoluteContext, RotaryContext
from diagd.engines.engine import Engine, Int
from diagd.errors import UsageError
from diagd.runtime.slots import SlotRing
from diagd.schedule import Schedule, StreamLayout


class Refill(NamedTuple):
    """Known tokens to feed again: stream positions of their ids, and positions inside the window."""

    sources: Int
    positions: Int


class ContextPolicy(Protocol):
    """Keeps the cache to the window as frames begin."""

    def check(self, schedule: Schedule, last_frame: int) -> None:
        """Refuse a schedule under which the context cannot slide as far as ``last_frame``."""
        ...

    def advance(self, frame: int, fed: int) -> Refill | None:
        """Make room for ``frame``, whose first step feeds stream positions from ``fed`` on."""
        ...


class SlidingRotary:
    """Voids what leaves the window; turns cached keys back when the rotary table ends."""

    def __init__(
        self, context: RotaryContext, layout: StreamLayout, window: int, slots: SlotRing, engine: Engine
    ) -> None:
        self._context, self._layout, self._window = context, layout, window
        self._slots, self._engine = slots, engine

    def check(self, schedule: Schedule, last_frame: int) -> None:
        """Any schedule can slide."""

    def advance(self, frame: int, fed: int) -> None:
        """See ``ContextPolicy.advance``; nothing is ever fed again."""
        del fed
        oldest = max(0, frame - self._window + 1)
        if oldest:
            self._slots.evict(self._layout.prefix, self._layout.frame_start(oldest))
        if self._layout.frame_start(frame + 2) - self._slots.base > self._context.positions:
            self._rebase(oldest)

    def _rebase(self, oldest: int) -> None:
        frames = oldest - self._slots.base // self._layout.frame_length
        self._engine.rotate_keys(-frames * np.asarray(self._context.frame_angles), self._slots.live)
        self._slots.rebase(frames * self._layout.frame_length)


class SlidingAbsolute:
    """Drops ``roll`` frames at once and has the rest fed again at their new positions."""

    def __init__(self, layout: StreamLayout, window: int, roll: int, slots: SlotRing) -> None:
        if not 1 <= roll < window:
            raise UsageError(f"roll={roll} frames at once is outside 1..{window - 1}, the window less one")
        self._layout, self._window, self._roll, self._slots = layout, window, roll, slots

    def check(self, schedule: Schedule, last_frame: int) -> None:
        """Refuse to slide while frames overlap.

        Raises:
            UsageError: it would have to.
        """
        if schedule.d < schedule.steps_per_frame and last_frame - self._base_frame >= self._window:
            raise UsageError(
                f"frame {last_frame} slides the window of {self._window} frames, which this model does only "
                f"between frames; d={schedule.d} overlaps them: use serial frames, or fewer frames"
            )

    def advance(self, frame: int, fed: int) -> Refill | None:
        """See ``ContextPolicy.advance``; a prefix keeps its positions at the start of the window."""
        surplus = frame - self._base_frame - self._window + 1
        if surplus <= 0:
            return None
        layout = self._layout
        base = (self._base_frame + -(-surplus // self._roll) * self._roll) * layout.frame_length
        self._slots.restart(base)
        prefix, rest = np.arange(layout.prefix), np.arange(layout.prefix + base, fed)
        sources, positions = np.concatenate([prefix, rest]), np.concatenate([prefix, rest - base])
        return Refill(sources.astype(np.int32), positions.astype(np.int32))

    @property
    def _base_frame(self) -> int:
        return self._slots.base // self._layout.frame_length


def context_policy(
    context: RotaryContext | AbsoluteContext,
    layout: StreamLayout,
    window: int,
    slots: SlotRing,
    engine: Engine,
    roll: int | None,
) -> ContextPolicy:
    """The policy of a model; ``roll`` None is the manifest's, as far as the window allows.

    Raises:
        UsageError: the model slides without rolling, or ``roll`` does not fit the window.
    """
    if isinstance(context, AbsoluteContext):
        chosen = min(context.roll, window - 1) if roll is None else roll
        return SlidingAbsolute(layout, window, chosen, slots)
    if roll is not None:
        raise UsageError("roll is for models with absolute positions; this one slides at no cost")
    return SlidingRotary(context, layout, window, slots, engine)
