"""Where worlds are played: tables whose games share passes of an engine, and the thread that plays them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from diagd.play.stage import GameLoop, Pacer
from diagd.play.table import ServedTable, Table


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


class Fleet(Protocol):
    """Tables, by number, wherever they are played."""

    tables: Sequence[ServedTable]

    @property
    def is_alive(self) -> bool:
        """Whether anything can be played."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Play; the players' connections belong to the loop."""

    async def close(self) -> None:
        """End after the frames that are decoded now."""

    def check(self) -> None:
        """Go on.

        Raises:
            DiagdError: nothing can be played any more.
        """
        return

    def beside(self, number: int) -> Sequence[int]:
        """Tables on the engine of one, itself included; none where it has no engine now."""

    def figures(self, number: int) -> Figures:
        """Of the engine of a table."""

    def seated(self, number: int) -> None:
        """Another number plays: what its engine took before says nothing of what it takes now."""

    def metrics(self) -> Sequence[tuple[str, str, str, float]]:
        """Name, kind, meaning and value of further figures."""
        return ()


class LocalFleet(Fleet):
    """Tables of this process, over one engine."""

    tables: Sequence[Table]

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tuple(tables)
        self.game_loop = GameLoop([table.stage for table in self.tables])

    @override
    @property
    def is_alive(self) -> bool:
        return self.game_loop.is_alive()

    @override
    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        for table in self.tables:
            table.open(loop)
        self.game_loop.start()

    @override
    async def close(self) -> None:
        await asyncio.to_thread(self.game_loop.close)

    @override
    def beside(self, number: int) -> Sequence[int]:
        return range(len(self.tables))

    @override
    def figures(self, number: int = 0) -> Figures:
        pacer, late = self.game_loop.pacer, sum(table.stage.pacer.late for table in self.tables)
        p50, p95 = pacer.percentile(50), pacer.percentile(95)
        return Figures(self.game_loop.frames, late, p50, p95, pacer.measured)

    @override
    def seated(self, number: int = 0) -> None:
        self.game_loop.pacer = Pacer(1.0)
