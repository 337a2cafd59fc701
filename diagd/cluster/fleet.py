"""Worlds that are played on the nodes of a Ray cluster, behind one server that knows where each is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple

from typing_extensions import override

from diagd.bundle import Bundle
from diagd.cluster.workers import EngineOptions, connect
from diagd.errors import DiagdError, EngineError, UsageError
from diagd.play.game import SavedGame
from diagd.play.messages import Message, without_paths
from diagd.play.opening import GameOptions
from diagd.play.record import Line
from diagd.play.service import Service, opened_tables
from diagd.play.table import Figures, Fleet, LocalFleet, Player, ServedTable, Table

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


_MOVES: Final = {"type": "error", "text": "the machine of this world is gone; it goes on elsewhere"}
_PAUSE: Final = 0.5
"""Seconds until the next try."""

_LOG = logging.getLogger(__name__)


class RemoteTable(ServedTable):
    """What is kept here of a world that is played elsewhere.

    ``engine`` and ``number`` say where; they change when that engine is lost, and it ``is_away`` meanwhile.
    ``saved`` is what it takes to go on with it.
    """

    def __init__(self, engine: RemoteEngine, number: int, size: tuple[int, int]) -> None:
        super().__init__(size)
        self.engine, self.number = engine, number
        self.saved, self.is_away = SavedGame(), True

    def _say(self, kind: str, *values: Any) -> None:
        """Have something done there, after what was said before."""
        self.engine.say(Call(self.number, kind, values))

    @override
    def seat(self, player: Player, ticket: str, is_new: bool) -> None:
        self.player, self.heard, self.ticket = player, time.monotonic(), ticket
        if is_new:
            self.saved = SavedGame()
        if self.is_away:
            player.send(_MOVES)
        else:
            self._say("seat", ticket, is_new)

    @override
    def leave(self) -> None:
        self.player = None
        if not self.is_away:
            self._say("leave")

    @override
    def clear(self) -> None:
        super().clear()
        self.saved = SavedGame()

    @override
    def take_up(self, saved: SavedGame, ticket: str) -> None:
        self.saved, self.ticket = saved, ticket

    @override
    def obey(self, player: Player, message: Message) -> None:
        self.heard = time.monotonic()
        if not self.is_away:
            self._say("obey", message)

    @override
    def upload(self, player: Player, data: bytes) -> None:
        if player is self.player and not self.is_away:
            self._say("upload", data)

    def lose(self) -> None:
        """The engine is gone."""
        self.is_away = True
        if self.player is not None:
            self.player.send(_MOVES)

    def settle(self) -> None:
        """Go on where it is now."""
        self.is_away = False
        if self.ticket:
            self._say("take_up", self.saved, self.ticket)
            if self.player is not None:
                self._say("seat", self.ticket, False)

    def hear(self, kind: str, value: Any) -> None:
        """What the engine tells of this world."""
        if kind == "line":
            self.saved.add(value)
        elif kind == "saved":
            self.saved.take(value)
            if self.keep is not None:
                self.keep(value)
        elif self.player is not None and kind == "send":
            self.player.send(value)
        elif self.player is not None:
            self.player.show(*value)


class RemoteEngine:
    """An engine on some node, which is started anew, there or elsewhere, when it is lost.

    ``node`` is where it was started last, as Ray names it; ``figures`` are those that it told last.
    """

    def __init__(self, fleet: RayFleet) -> None:
        self._fleet, self.is_alive, self.figures = fleet, False, Figures()
        self.actor: Any = None
        self.node = ""
        self._calls: list[Call] = []
        self._said = asyncio.Event()

    def say(self, call: Call) -> None:
        """Send something after what was said before."""
        self._calls.append(call)
        self._said.set()

    async def run(self) -> None:
        """Play until cancelled.

        Raises:
            EngineError: it cannot play what it is given.
        """
        from ray.exceptions import RayError, RayTaskError

        while True:
            try:
                self.actor = self._fleet.start_actor()
                self.node = await self.actor.begin.remote()
                self.is_alive = True
                self._fleet.settle()
                await self._live(self.actor)
            except RayError as error:
                if isinstance(error, RayTaskError) and not self.is_alive:
                    raise EngineError(f"an engine cannot play: {error.cause}") from error
                reason = str(error).strip().splitlines()[-1]
                _LOG.warning("an engine was lost, another one is started: %s", reason)
                self._lose()
                await asyncio.sleep(_PAUSE)

    async def _live(self, actor: Any) -> None:
        """Talk and listen until either fails."""
        talking = asyncio.create_task(self._talk(actor))
        try:
            while not talking.done():
                events, self.figures = await actor.hear.remote()
                for event in events:
                    self._fleet.hear(self, event)
            talking.result()
        finally:
            talking.cancel()

    async def _talk(self, actor: Any) -> None:
        while True:
            await self._said.wait()
            self._said.clear()
            calls, self._calls = self._calls, []
            await actor.do.remote(calls)

    def _lose(self) -> None:
        """It is gone, with all that was said to it."""
        self.is_alive, self.figures, self._calls = False, Figures(), []
        self._fleet.lose(self)
        self._fleet.settle()


class RayFleet(Fleet):
    """Engines on the nodes of a cluster, each with as many tables as one of this process.

    A world whose engine is lost goes on at a table that is free elsewhere, else where the engine is started
    anew: from its last snapshot, and the lines of its record since, which are kept here. The bundle is in the
    same place on every node; ``service`` is that of each engine.
    """

    tables: Sequence[RemoteTable]

    def __init__(
        self, bundle: Bundle, options: GameOptions, service: Service, cluster: EngineOptions
    ) -> None:
        assert cluster.cluster is not None
        self._ray = ray = connect(cluster.cluster)
        count = cluster.engines or sum(bool(node["Alive"]) for node in ray.nodes())
        cpu = options.session.cpu
        if not cpu.threads:
            cpu = replace(cpu, threads=max(1, int(cluster.cores)))
        options = replace(options, session=replace(options.session, cpu=cpu))
        kind = ray.remote(
            num_cpus=cluster.cores, num_gpus=cluster.gpus, scheduling_strategy="SPREAD", max_restarts=0
        )(PlayActor)
        self.start_actor: Callable[[], Any] = lambda: kind.remote(bundle.path.resolve(), options, service)
        self.engines = [RemoteEngine(self) for _ in range(count)]
        tokenizer = bundle.manifest.tokenizer
        if tokenizer is None:
            raise UsageError(f"{bundle.path} has no tokenizer, so nothing of it can be shown")
        size = tokenizer.height, tokenizer.width
        numbers = range(service.sessions)
        self.tables = [RemoteTable(engine, number, size) for number in numbers for engine in self.engines]
        self.moves = 0
        self._tasks: list[asyncio.Task[None]] = []

    @override
    @property
    def is_alive(self) -> bool:
        return any(engine.is_alive for engine in self.engines)

    @override
    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._tasks = [loop.create_task(engine.run()) for engine in self.engines]

    @override
    def check(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    @override
    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for engine in self.engines:
            if engine.actor is not None:
                self._ray.kill(engine.actor)

    @override
    def beside(self, number: int) -> Sequence[int]:
        table = self.tables[number]
        if table.is_away:
            return ()
        return [n for n, one in enumerate(self.tables) if one.engine is table.engine]

    @override
    def figures(self, number: int) -> Figures:
        return self.tables[number].engine.figures

    @override
    def seated(self, number: int) -> None:
        engine = self.tables[number].engine
        engine.figures = replace(engine.figures, measured=0)

    @override
    def metrics(self) -> Sequence[tuple[str, str, str, float]]:
        alive = sum(engine.is_alive for engine in self.engines)
        return (
            ("engines", "gauge", "that answer", alive),
            ("moves", "counter", "worlds that went on at another table", self.moves),
        )

    def hear(self, engine: RemoteEngine, event: Event) -> None:
        """News of a table of an engine."""
        place = engine, event.number
        next(one for one in self.tables if (one.engine, one.number) == place).hear(event.kind, event.value)

    def lose(self, engine: RemoteEngine) -> None:
        """An engine is gone."""
        for table in self.tables:
            if table.engine is engine and not table.is_away:
                table.lose()

    def settle(self) -> None:
        """Have worlds go on that are away: where they were, or at a table that is nobody's."""
        for table in self.tables:
            if table.is_away and table.engine.is_alive:
                table.settle()
        spare = [table for table in self.tables if not table.is_away and not table.ticket]
        away = [table for table in self.tables if table.is_away and table.ticket]
        for table, other in zip(away, spare, strict=False):
            table.engine, other.engine = other.engine, table.engine
            table.number, other.number, other.is_away = other.number, table.number, True
            table.settle()
            self.moves += 1
