"""Where worlds are played: tables whose games share passes of an engine, and the thread that plays them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from diagd.play.messages import Message
from diagd.play.saved import SavedGame
from diagd.play.stage import Conductor, Pacer
from diagd.play.table import Player, Table


@dataclass(frozen=True)
class Figures:
    """Of one engine.

    Attributes:
        frames, late: decoded, and ticks that were missed, so far.
        p50, p95: seconds of the passes and pictures of all, of late.
        measured: frames that these are of, since somebody was seated.
    """

    frames: int = 0
    late: int = 0
    p50: float = 0.0
    p95: float = 0.0
    measured: int = 0


class Desk(Protocol):
    """What a server sees of a table.

    Attributes:
        size: height and width of its pictures.
        heard: when its player last held a key or said something (``time.monotonic``).
        ticket: of whose world it is; "": of nobody's.
        keep: is given snapshots of its world, and None when it is nobody's.
    """

    size: tuple[int, int]
    heard: float
    ticket: str
    keep: Callable[[bytes | None], None] | None

    def seat(self, player: Player, ticket: str, is_new: bool) -> None:
        """Let somebody play."""
        ...

    def leave(self) -> None:
        """Nobody plays any more."""
        ...

    def clear(self) -> None:
        """Its world is nobody's any more."""
        ...

    def take_up(self, saved: SavedGame, ticket: str) -> None:
        """Go on with a world that was played elsewhere, as its player comes back."""
        ...

    def obey(self, player: Player, message: Message) -> None:
        """What the player says."""
        ...

    def upload(self, player: Player, data: bytes) -> None:
        """A picture to begin a world from."""
        ...


class Fleet(Protocol):
    """Tables, wherever they are played."""

    @property
    def tables(self) -> Sequence[Desk]:
        """All of them, by number."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether anything can be played."""
        ...

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Play; the players' connections belong to the loop."""
        ...

    async def close(self) -> None:
        """End after the frames that are decoded now."""
        ...

    def check(self) -> None:
        """Go on.

        Raises:
            DiagdError: nothing can be played any more.
        """
        ...

    def beside(self, number: int) -> Sequence[int]:
        """Tables on the engine of one, itself included; none where it has no engine now."""
        ...

    def figures(self, number: int) -> Figures:
        """Of the engine of a table."""
        ...

    def seated(self, number: int) -> None:
        """Somebody was seated: what its engine took before says nothing of what it takes now."""
        ...

    def metrics(self) -> Sequence[tuple[str, str, str, float]]:
        """Name, kind, meaning and value of further figures."""
        ...


class LocalFleet:
    """See ``Fleet``: tables of this process, over one engine."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables: Sequence[Table] = tuple(tables)
        self.conductor = Conductor([table.stage for table in self.tables])

    @property
    def is_alive(self) -> bool:
        """See ``Fleet``."""
        return self.conductor.is_alive()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """See ``Fleet``."""
        for table in self.tables:
            table.open(loop)
        self.conductor.start()

    async def close(self) -> None:
        """See ``Fleet``."""
        await asyncio.to_thread(self.conductor.close)

    def check(self) -> None:
        """See ``Fleet``."""

    def beside(self, number: int) -> Sequence[int]:
        """See ``Fleet``."""
        return range(len(self.tables))

    def figures(self, number: int = 0) -> Figures:
        """See ``Fleet``."""
        pacer, late = self.conductor.pacer, sum(table.stage.pacer.late for table in self.tables)
        p50, p95 = pacer.percentile(50), pacer.percentile(95)
        return Figures(self.conductor.frames, late, p50, p95, pacer.measured)

    def seated(self, number: int = 0) -> None:
        """See ``Fleet``."""
        self.conductor.pacer = Pacer(1.0)

    def metrics(self) -> Sequence[tuple[str, str, str, float]]:
        """See ``Fleet``."""
        return ()
