"""One seat in front of a world: who has it, and who waits."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

HELD_SECONDS: Final = 60.0
"""How long a seat is held for a player who went away."""

MAX_WAITING: Final = 16


class Guest(Protocol):
    """Somebody at the door, who is told where they stand."""

    def seated(self, ticket: str, is_new: bool) -> None:
        """They have the seat; the ticket brings them back to it. ``is_new``: the world is to begin anew."""

    def waits(self, place: int) -> None:
        """So many are seated or wait before them."""

    def put_out(self) -> None:
        """Somebody came with their ticket."""


Somebody = TypeVar("Somebody", bound=Guest)


class Room(Generic[Somebody]):
    """Gives the seat to the first, then in turn."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.player: Somebody | None = None
        self.waiting: list[Somebody] = []
        self._ticket = ""
        self._left = -HELD_SECONDS

    def enter(self, guest: Somebody, ticket: str) -> bool:
        """Somebody came; False where too many wait already."""
        known = bool(self._ticket) and hmac.compare_digest(ticket.encode(), self._ticket.encode())
        if known:
            before, self.player = self.player, guest
            if before is not None:
                before.put_out()
            guest.seated(self._ticket, is_new=False)
            return True
        if len(self.waiting) >= MAX_WAITING:
            return False
        self.waiting.append(guest)
        self.turn(guest)
        return True

    def leave(self, guest: Somebody) -> None:
        """Somebody went away; a player's seat is held a while."""
        if guest is self.player:
            self.player, self._left = None, self._clock()
        elif guest in self.waiting:
            self.waiting.remove(guest)
            self._tell()

    def turn(self, newcomer: Somebody | None = None) -> None:
        """Give the seat on where it is free, and tell the others; else tell the newcomer alone."""
        is_free = self.player is None and self._clock() - self._left >= HELD_SECONDS
        if is_free and self.waiting:
            self.player = self.waiting.pop(0)
            self._ticket = secrets.token_urlsafe(16)
            self.player.seated(self._ticket, is_new=True)
            self._tell()
        elif newcomer is not None:
            newcomer.waits(self.waiting.index(newcomer) + 1)

    def _tell(self) -> None:
        for place, guest in enumerate(self.waiting, start=1):
            guest.waits(place)
