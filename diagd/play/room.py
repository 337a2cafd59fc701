"""Seats in front of worlds: who has them, and who waits."""

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


class Seat(Generic[Somebody]):
    """One seat, its ``player``, when it was ``taken``, and the ``ticket`` to it; "": it is nobody's."""

    def __init__(self, number: int) -> None:
        self.number, self.ticket = number, ""
        self.player: Somebody | None = None
        self.taken = self.left = 0.0


class Room(Generic[Somebody]):
    """Gives seats to the first, then in turn.

    ``admits`` says whether one more player may have a free seat now; ``cleared`` is told of a seat that was
    taken away.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        seats: int = 1,
        admits: Callable[[Seat[Somebody]], bool] = lambda seat: True,
        cleared: Callable[[Seat[Somebody]], None] = lambda seat: None,
    ) -> None:
        self._clock, self._admits, self._cleared = clock, admits, cleared
        self.seats: tuple[Seat[Somebody], ...] = tuple(Seat(number) for number in range(seats))
        self.waiting: list[Somebody] = []

    def seat_of(self, guest: Somebody) -> Seat[Somebody] | None:
        """The seat that somebody has."""
        return next((seat for seat in self.seats if seat.player is guest), None)

    def enter(self, guest: Somebody, ticket: str) -> bool:
        """Somebody came; False where too many wait already."""
        for seat in self.seats:
            if seat.ticket and hmac.compare_digest(ticket.encode(), seat.ticket.encode()):
                before, seat.player = seat.player, guest
                if before is not None:
                    before.put_out()
                guest.seated(seat.ticket, is_new=False)
                return True
        if len(self.waiting) >= MAX_WAITING:
            return False
        self.waiting.append(guest)
        self.turn(guest)
        return True

    def leave(self, guest: Somebody) -> None:
        """Somebody went away; a player's seat is held a while."""
        if (seat := self.seat_of(guest)) is not None:
            seat.player, seat.left = None, self._clock()
        elif guest in self.waiting:
            self.waiting.remove(guest)
            self._announce()

    def clear(self, seat: Seat[Somebody]) -> None:
        """Take a seat away from whom it belongs."""
        seat.player, seat.ticket = None, ""
        self._cleared(seat)

    def put_back(self, seat: Seat[Somebody]) -> None:
        """Take a seat from its player, who is the next to get one."""
        guest = seat.player
        assert guest is not None
        self.clear(seat)
        self.waiting.insert(0, guest)
        self._announce()

    def hold(self, seat: Seat[Somebody], ticket: str) -> None:
        """A seat is somebody's who is not there, as one who went away."""
        seat.ticket, seat.taken, seat.left = ticket, self._clock(), self._clock()

    def turn(self, newcomer: Somebody | None = None) -> None:
        """Give seats on where they are free, and tell the others; else tell the newcomer alone."""
        moved = False
        for seat in self.seats:
            if seat.player is None and seat.ticket and self._clock() - seat.left >= HELD_SECONDS:
                self.clear(seat)
            if not seat.ticket and self.waiting and self._admits(seat):
                seat.player, moved = self.waiting.pop(0), True
                seat.ticket, seat.taken = secrets.token_urlsafe(16), self._clock()
                seat.player.seated(seat.ticket, is_new=True)
        if moved:
            self._announce()
        elif newcomer is not None:
            newcomer.waits(self.waiting.index(newcomer) + 1)

    def _announce(self) -> None:
        for place, guest in enumerate(self.waiting, start=1):
            guest.waits(place)
