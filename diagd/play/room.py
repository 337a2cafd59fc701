"""Tables: who plays at them, and who waits."""

from __future__ import annotations

import hmac
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from diagd.play.stage import SHARE, Engine
from diagd.play.table import Player, ServedTable

HELD_SECONDS: Final = 60.0
"""How long a table, or a place in the queue, is held for somebody who went away."""

MAX_WAITING: Final = 16
PUT_OUT: Final = 4001
"""Code of a connection that is closed because somebody came with its ticket."""

SETTLED: Final = 10
"""Frames that show what one more player takes, ahead of the next one."""

PROVEN: Final = 40
"""Frames that show that a rate cannot be kept with so many."""

TRIAL_SECONDS: Final = 60.0
"""That the last player is on trial, and that nobody is tried behind one who was too many."""


@dataclass(eq=False)
class Waiter:
    """Somebody in the queue, with the ticket of the table they will have; ``left``: when they went away."""

    guest: Player
    ticket: str = field(default_factory=partial(secrets.token_urlsafe, 16))
    left: float = math.inf


class Room:
    """Gives tables to the first, then in turn.

    With a ``rate``, in frames a second, nobody is seated who would take it from others, and who is found
    to in the first minute waits again; else who plays gets what there is.

    Attributes:
        refused, returned: times that a free table was not given, and that one was taken back, for the rate.
        is_closing: nobody gets a table any more, and what is kept of worlds is for the next server.
    """

    def __init__(
        self,
        tables: Sequence[ServedTable],
        rate: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tables, self.rate, self._clock = tables, rate, clock
        self.refused = self.returned = 0
        self._full: dict[Engine, float] = {}  # until when nobody is tried
        self._queue: list[Waiter] = []
        self.is_closing = False

    @property
    def waiting(self) -> list[Waiter]:
        """Who is there of the queue, in turn."""
        return [one for one in self._queue if one.left == math.inf]

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
                table.left = self._clock()
                return True
        for one in self._queue:
            if hmac.compare_digest(ticket.encode(), one.ticket.encode()):
                if one.left == math.inf:
                    one.guest.close(PUT_OUT, "the world was opened elsewhere")
                one.guest, one.left = guest, math.inf
                self._announce()
                return True
        if len(self._queue) >= MAX_WAITING:
            gone = min(self._queue, key=lambda one: one.left)
            if gone.left == math.inf:
                return False
            self._queue.remove(gone)
        self._queue.append(Waiter(guest))
        self.turn(guest)
        return True

    def leave(self, guest: Player) -> None:
        """Somebody went away; their table or place is held a while."""
        if (table := self.table_of(guest)) is not None:
            table.left = self._clock()
            table.leave()
        for one in self.waiting:
            if one.guest is guest:
                one.left = self._clock()
                self._announce()

    @property
    def engines(self) -> set[Engine]:
        """All that decode something."""
        return {table.engine for table in self._tables if table.engine is not None}

    def clear(self, table: ServedTable) -> None:
        """Take a table away from whom it belongs."""
        if self.is_closing:
            table.leave()
        else:
            table.clear()

    def shed(self) -> None:
        """Put back who came last, or chose settings, where frames take too long since: they are the next."""
        if self.rate is None or self.is_closing:
            return
        for engine in self.engines:
            figures, tables = engine.figures, [table for table in self._tables if table.engine is engine]
            last = max(
                (table for table in tables if table.player), key=lambda table: table.tried, default=None
            )
            alone = sum(bool(table.ticket) for table in tables) < 2
            kept = figures.measured < PROVEN or figures.p95 * self.rate <= 1
            if last is None or alone or kept or self._clock() - last.tried > TRIAL_SECONDS:
                continue
            assert last.player is not None
            self._queue.insert(0, Waiter(last.player))
            self.clear(last)
            self.returned += 1
            self._full[engine] = self._clock() + TRIAL_SECONDS
            self._announce()

    def turn(self, newcomer: Player | None = None) -> None:
        """Give tables on where they are free, and tell the others; else tell the newcomer alone."""
        now, moved = self._clock(), False
        self._queue = [one for one in self._queue if now - one.left < HELD_SECONDS]
        for table in () if self.is_closing else self._tables:
            if table.player is None and table.ticket and now - table.left >= HELD_SECONDS:
                self.clear(table)
            if not table.ticket and self.waiting and self._admits(table):
                moved = True
                table.taken = table.tried = now
                self._queue.remove(first := self.waiting[0])
                table.seat(first.guest, first.ticket, is_new=True)
        if moved or newcomer is not None:
            self._announce(None if moved else newcomer)

    def _admits(self, table: ServedTable) -> bool:
        """Whether all would still get their frames with one player more, by what passes took of late."""
        if (engine := table.engine) is None:
            return False
        beside = [other for other in self._tables if other.engine is engine]
        if self.rate is None or not any(other.player for other in beside):
            return True
        held = sum(bool(other.ticket) for other in beside)
        figures = engine.figures  # of what it takes since somebody was seated
        now, changed = self._clock(), max(max(other.tried, other.left) for other in beside)
        if figures.measured < SETTLED and now - changed < 2 * SETTLED / self.rate:
            return False  # later, those who play stand still
        is_full = now < self._full.get(engine, 0)
        if not is_full and figures.p95 * (held + 1) / held <= SHARE / self.rate:
            return True
        self.refused += 1
        return False

    def _announce(self, guest: Player | None = None) -> None:
        """Tell all who wait how many there are before them, themselves included; or one alone."""
        for place, one in enumerate(self.waiting, start=1):
            if guest in (None, one.guest):
                one.guest.send({"type": "waiting", "place": place, "ticket": one.ticket})
