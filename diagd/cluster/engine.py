"""The far end: an actor that plays the worlds of one engine, and tells of them when it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple

from typing_extensions import override

from diagd.errors import DiagdError
from diagd.play.fleet import Figures, LocalFleet
from diagd.play.messages import Message, without_paths
from diagd.play.opening import GameOptions
from diagd.play.record import Line
from diagd.play.saved import SavedGame
from diagd.play.service import Service, opened_tables
from diagd.play.table import Player, Table

_PATIENCE: Final = 0.5
"""Seconds that somebody who asks waits for news at most."""


class Call(NamedTuple):
    """Something that a table is to do: ``kind`` is a method of `Seat`."""

    number: int
    kind: str
    values: tuple[Any, ...]


class Event(NamedTuple):
    """News of a table: a line of its record, a snapshot, or what its player is told and shown."""

    number: int
    kind: str
    value: Any


class PlayActor:
    """What an actor of Ray is made of."""

    def __init__(self, bundle: Path, options: GameOptions, service: Service) -> None:
        self._given = bundle, options, service
        self._held = ExitStack()
        self._news: list[Event] = []

    async def begin(self) -> str:
        """Play; gives the node where."""
        tables = self._held.enter_context(opened_tables(*self._given))
        self._seats = [_Seat(self, number, table) for number, table in enumerate(tables)]
        self._fleet = LocalFleet(tables)
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._fleet.start(self._loop)
        return str(import_module("ray").get_runtime_context().get_node_id())

    async def do(self, calls: Sequence[Call]) -> None:
        """What is said to tables."""
        for call in calls:
            if call.kind == "seat":
                self._fleet.seated()
            try:
                getattr(self._seats[call.number], call.kind)(*call.values)
            except DiagdError as error:
                told = {"type": "error", "text": without_paths(str(error))}
                self.send(Event(call.number, "send", told))

    async def hear(self) -> tuple[list[Event], Figures]:
        """What happened since the last time, as soon as something did."""
        with suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), _PATIENCE)
        self._changed.clear()
        news, self._news = self._news, []
        return news, self._fleet.figures()

    def send(self, event: Event) -> None:
        """Add to the news, in the loop; of pictures that nobody fetched the newest are enough."""
        if event.kind == "show":
            self._news = [one for one in self._news if one[:2] != event[:2]]
        self._news.append(event)
        self._changed.set()

    def send_soon(self, event: Event) -> None:
        """Likewise, from any thread."""
        self._loop.call_soon_threadsafe(self.send, event)


class _Seat(Player):
    """A table's player, in place of the one who is far away."""

    def __init__(self, actor: PlayActor, number: int, table: Table) -> None:
        self._actor, self._number, self._table = actor, number, table
        table.keep = self._keep

    @override
    def send(self, message: dict[str, Any] | bytes) -> None:
        self._actor.send(Event(self._number, "send", message))

    @override
    def show(self, number: int, update: bytes) -> None:
        self._actor.send(Event(self._number, "show", (number, update)))

    def _hear(self, line: Line) -> None:
        self._actor.send_soon(Event(self._number, "line", line))

    def _keep(self, snapshot: bytes | None) -> None:
        if snapshot is not None:
            self._actor.send_soon(Event(self._number, "saved", snapshot))

    def _listen(self) -> None:
        """Tell of its record from what is done next: not of the world that its engine began with."""
        self._table.stage.post(lambda: setattr(self._table.game.record, "heard", self._hear))

    def seat(self, ticket: str, is_new: bool) -> None:
        """Play."""
        self._listen()
        self._table.seat(self, ticket, is_new)

    def leave(self) -> None:
        """Nobody plays."""
        self._table.leave()

    def obey(self, message: Message) -> None:
        """What the player says."""
        self._table.obey(self, message)

    def upload(self, data: bytes) -> None:
        """A picture of the player."""
        self._table.upload(self, data)

    def take_up(self, saved: SavedGame, ticket: str) -> None:
        """Go on with a world that was played elsewhere."""
        self._listen()
        self._table.take_up(saved, ticket)
