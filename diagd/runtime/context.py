"""How a session's context slides when its window is full, and how it is built again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Manifest
from diagd.bundle.manifest import AbsoluteContext, RotaryContext
from diagd.errors import UsageError
from diagd.runtime.slots import SlotRing
from diagd.schedule import StreamLayout
from diagd.schedule.table import Int

Rotate: TypeAlias = Callable[[NDArray[np.float64], int], None]
"""Turns cached keys by angles, up to a slot; see ``Engine.rotate_keys``."""


class Refill(NamedTuple):
    """Known tokens to feed in raster order: stream positions of their ids, and where they are fed."""

    sources: Int
    positions: Int


class Replay(NamedTuple):
    """How a cache is filled again: frames [first, behind) in raster order, others as they were decoded."""

    first: int
    behind: int


class SlidingRotary:
    """Voids what leaves the window; turns cached keys back when the rotary table ends.

    A frame that was voided does not come back where the stream does, so an action may not depend on it.

    Attributes:
        needed: frames that ``replay`` reaches back at most.
        horizon: last frame that overlapping frames may reach; None: any.
        slides_first: the model acts in the window of the frame to come, else in that of the frame before.
    """

    horizon = None
    slides_first = True

    def __init__(
        self, manifest: Manifest, context: RotaryContext, window: int, slots: SlotRing, rotate: Rotate
    ) -> None:
        self._context, self._layout, self._window = context, manifest.layout, window
        self._slots, self._rotate = slots, rotate
        self._oldest = self._built = 0
        # A row of layer l was computed from rows of layer l - 1 up to a window before it: beyond so many
        # frames nothing reaches the rows that are still seen. One more is fed as a stand-in for a prompt.
        self.needed = manifest.cache.layers * (window - 1) + 1

    def advance(self, frame: int, fed: int) -> Refill | None:
        """Make room for ``frame``, whose first step feeds positions from ``fed`` on; nothing is fed again."""
        del fed
        self._oldest = max(0, frame - self._window + 1)
        if self._oldest:
            self._slots.evict(self._layout.prefix, self._layout.frame_start(self._oldest))
        if self._layout.frame_start(frame + 2) - self._slots.base > self._context.positions:
            self._rebase(self._oldest)
        return None

    def holds(self, known: int, overlapped: bool) -> bool:
        """Whether the cache has all that a stream needs which goes on behind its first ``known`` frames.

        And nothing else: where the last is ``overlapped``, it may have been decoded beside one that is given
        up, and not have seen what that evicted.
        """
        return known >= self._built and self._oldest <= max(0, known - self._window + (not overlapped))

    def replay(self, known: int, kept: int, prompt: int) -> Replay:
        """Forget all rows and say how they come back, of ``known`` frames: the first ``prompt`` were given.

        From so far back, of those that are there from ``kept`` on, that what is seen depends on no other.
        """
        self._oldest = 0
        self._slots.restart(0)
        first = max(kept, known - self.needed)
        self._built = known if first else 0  # what goes on from further back sees rows that depend on others
        return Replay(first, min(known, prompt if first == 0 else first + 1))

    def resume(self, frame: int) -> None:
        """The prefix has been fed: have its keys turned back, to keep their distance to the frame."""
        if frame:
            self._rebase(frame)

    def _rebase(self, oldest: int) -> None:
        frames = oldest - self._slots.base // self._layout.frame_length
        if self._slots.live:  # an engine that has run nothing for this stream may have no rows of it
            self._rotate(-frames * np.asarray(self._context.frame_angles), self._slots.live)
        self._slots.rebase(frames * self._layout.frame_length, self._layout.prefix)


class SlidingAbsolute:
    """Drops ``roll`` frames at once and has the rest fed again at their new positions.

    As in the release of WHAM, the model acts in the whole window, ahead of that. See ``SlidingRotary``.
    """

    slides_first = False

    def __init__(self, layout: StreamLayout, window: int, roll: int, slots: SlotRing) -> None:
        if not 1 <= roll < window:
            raise UsageError(f"roll={roll} frames at once is outside 1..{window - 1}, the window less one")
        self._layout, self._window, self._roll, self._slots = layout, window, roll, slots
        self.needed = window

    @property
    def horizon(self) -> int:
        """Overlapping frames cannot be fed again: the window must not slide under them."""
        return self._base_frame + self._window - 1

    def advance(self, frame: int, fed: int) -> Refill | None:
        """A prefix keeps its positions at the start of the window."""
        surplus = frame - self._base_frame - self._window + 1
        if surplus <= 0:
            return None
        layout = self._layout
        base = (self._base_frame + -(-surplus // self._roll) * self._roll) * layout.frame_length
        self._slots.restart(base)
        prefix, rest = np.arange(layout.prefix), np.arange(layout.prefix + base, fed)
        return Refill(np.concatenate([prefix, rest]), np.concatenate([prefix + base, rest]))

    def holds(self, known: int, overlapped: bool) -> bool:
        """Whether the window had slid as far when the last frame was decoded."""
        return self._base_frame == self._base_of(known - 1)

    def replay(self, known: int, kept: int, prompt: int) -> Replay:
        """From the frame on at which the window stands, as it was fed when it slid there."""
        base = self._base_of(known - 1)
        self._slots.restart(base * self._layout.frame_length)
        first = max(base, kept)
        fed = base - self._roll + self._window if base else prompt
        return Replay(first, min(known, max(fed, first + 1)))

    def resume(self, frame: int) -> None:
        """Positions are counted so that the frame can follow the prefix."""

    def _base_of(self, frame: int) -> int:
        """First frame of the window once ``frame`` has begun: a function of the frame alone."""
        return max(0, -(-(frame - self._window + 1) // self._roll) * self._roll)

    @property
    def _base_frame(self) -> int:
        return self._slots.base // self._layout.frame_length


ContextPolicy: TypeAlias = SlidingRotary | SlidingAbsolute
"""Keeps the cache to the window as frames begin."""


def context_policy(
    manifest: Manifest, window: int, slots: SlotRing, rotate: Rotate, roll: int | None
) -> ContextPolicy:
    """The policy of a model; ``roll`` None is the manifest's, as far as the window allows.

    Raises:
        UsageError: the model slides without rolling, or ``roll`` does not fit the window.
    """
    context = manifest.context
    if isinstance(context, AbsoluteContext):
        chosen = min(context.roll, window - 1) if roll is None else roll
        return SlidingAbsolute(manifest.layout, window, chosen, slots)
    if roll is not None:
        raise UsageError("roll is for models with absolute positions; this one slides at no cost")
    return SlidingRotary(manifest, context, window, slots, rotate)
