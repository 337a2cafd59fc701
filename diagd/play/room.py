"""Tables: who plays at them, and who waits."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final

from diagd.play.table import Player, ServedTable

HELD_SECONDS: Final = 60.0
"""How long a table is held for a player who went away."""

MAX_WAITING: Final = 16
PUT_OUT: Final = 4001
"""Code of a connection that is closed because somebody came with its ticket."""


class Room:
    """Gives tables to the first, then in turn.

    ``admits`` says whether one more player may have a free table now.

    Attributes:
        is_closing: nobody gets a table any more, and what is kept of worlds is for the next server.
    """

    def __init__(
        self,
        tables: Sequence[ServedTable],
        admits: Callable[[ServedTable], bool] = lambda table: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tables, self._admits, self._clock = tables, admits, clock
        self.waiting: list[Player] = []
        self.is_closing = False

    def table_of(self, guest: Player) -> ServedTable | None:
        """The table that somebody plays at."""
        return next((table for table in self._tables if table.player is guest), None)

    def enter(self, guest: Player, ticket: str) -> bool:
        """Somebody came; False where too many wait already."""
        for table in self._tables:
            if table.ticket and hmac.compare_digest(ticket.encode(), table.ticket.encode()):
                if table.player is not None:
                    table.player.close(PUT_OUT, "the world was opened elsewhere")
                table.seat(guest, table.ticket, is_new=False)
                return True
        if len(self.waiting) >= MAX_WAITING:
            return False
        self.waiting.append(guest)
        self.turn(guest)
        return True

    def leave(self, guest: Player) -> None:
        """Somebody went away; a player's table is held a while."""
        if (table := self.table_of(guest)) is not None:
            table.left = self._clock()
            table.leave()
        elif guest in self.waiting:
            self.waiting.remove(guest)
            self._announce()

    def clear(self, table: ServedTable) -> None:
        """Take a table away from whom it belongs."""
        if self.is_closing:
            table.leave()
        else:
            table.clear()

    def put_back(self, table: ServedTable) -> None:
        """Take a table from its player, who is the next to get one."""
        assert table.player is not None
        self.waiting.insert(0, table.player)
        self.clear(table)
        if table.engine is not None:
            table.engine.forget()
        self._announce()

    def turn(self, newcomer: Player | None = None) -> None:
        """Give tables on where they are free, and tell the others; else tell the newcomer alone."""
        moved = False
        for table in () if self.is_closing else self._tables:
            if table.player is None and table.ticket and self._clock() - table.left >= HELD_SECONDS:
                self.clear(table)
            if not table.ticket and self.waiting and self._admits(table):
                moved, table.taken = True, self._clock()
                table.seat(self.waiting.pop(0), secrets.token_urlsafe(16), is_new=True)
        if moved:
            self._announce()
        elif newcomer is not None:
            self._tell(newcomer)

    def _announce(self) -> None:
        for guest in self.waiting:
            self._tell(guest)

    def _tell(self, guest: Player) -> None:
        """How many wait before somebody, themselves included."""
        guest.send({"type": "waiting", "place": self.waiting.index(guest) + 1})
