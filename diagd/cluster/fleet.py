"""Worlds that are played on the nodes of a Ray cluster, behind one server that knows where each is."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple

from typing_extensions import override

from diagd.bundle import Bundle
from diagd.cluster.connection import cannot_begin, check_place, connect
from diagd.cluster.workers import EngineOptions
from diagd.errors import DiagdError, EngineError, UsageError
from diagd.play.game import SavedGame
from diagd.play.messages import Message, Playback, without_paths
from diagd.play.opening import GameOptions
from diagd.play.service import Service, opened_tables
from diagd.play.stage import Figures
from diagd.play.table import Fleet, LocalFleet, Player, ServedTable, Table, Update

_PATIENCE: Final = 0.5
"""Seconds that somebody who asks waits for news at most."""


class Call(NamedTuple):
    """Something that a table is to do: ``kind`` is a method of `Table`."""

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
        self._tables = self._held.enter_context(opened_tables(*self._given))
        self._players = [_Player(self, number) for number in range(len(self._tables))]
        self._fleet = LocalFleet(self._tables)
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._fleet.start(self._loop)
        for number, table in enumerate(self._tables):
            table.keep = partial(self.tell_soon, number, "saved")
            await self._begun(number, table)
        return str(import_module("ray").get_runtime_context().get_node_id())

    async def _begun(self, number: int, table: Table) -> None:
        """Its engine's first world is there, for nobody to see; what is done from here on is told."""
        begun = asyncio.Event()

        def listen() -> None:
            table.game.record.heard = lambda *lines: self.tell_soon(number, "lines", lines)
            self._loop.call_soon_threadsafe(begun.set)

        table.stage.post(listen)
        await begun.wait()

    async def end(self) -> list[Event]:
        """Play no more; gives snapshots of the worlds that are somebody's."""
        kept: list[Event] = []

        def keep(number: int, snapshot: bytes | None) -> None:
            kept.append(Event(number, "saved", snapshot))

        for number, table in enumerate(self._tables):
            table.keep = partial(keep, number)
        await self._fleet.close()
        return kept

    async def do(self, calls: Sequence[Call]) -> None:
        """What is said to tables."""
        for number, kind, values in calls:
            table = self._tables[number]
            try:
                if kind == "seat":
                    table.seat(self._players[number], *values)
                else:
                    getattr(table, kind)(*values)
            except DiagdError as error:
                self._players[number].send({"type": "error", "text": without_paths(str(error))})

    async def hear(self) -> tuple[list[Event], Figures]:
        """What happened since the last time, as soon as something did."""
        with suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), _PATIENCE)
        self._changed.clear()
        news, self._news = self._news, []
        return news, self._fleet.engine.figures

    def tell(self, number: int, kind: str, value: Any) -> None:
        """Add to the news, in the loop; of pictures that nobody fetched the newest are enough."""
        if kind == "show":
            dropped = next((one for one in self._news if one[:2] == (number, kind)), None)
            if dropped is not None:
                self._news.remove(dropped)
                value = value.instead_of(dropped.value)
        self._news.append(Event(number, kind, value))
        self._changed.set()

    def tell_soon(self, number: int, kind: str, value: Any) -> None:
        """Likewise, from any thread."""
        self._loop.call_soon_threadsafe(self.tell, number, kind, value)


class _Player(Player):
    """A table's player, in place of the one who is far away."""

    def __init__(self, actor: PlayActor, number: int) -> None:
        self._actor, self._number = actor, number

    @override
    def send(self, message: dict[str, Any] | bytes) -> None:
        self._actor.tell(self._number, "send", message)

    @override
    def show(self, update: Update) -> None:
        self._actor.tell(self._number, "show", update)


_MOVES: Final = {"type": "error", "text": "the machine of this world is gone; it goes on elsewhere"}
_PAUSE: Final = 0.5
"""Seconds until the next try."""

_SILENT: Final = 60.0
"""Seconds without a word from an engine, which has one every half second, until it is lost."""

_SLOW: Final = 30.0
"""Seconds until somebody is told that an engine has not begun."""

_FAREWELL: Final = 10.0
"""Seconds that an engine has to give its worlds as they are when the server ends."""

_LOG = logging.getLogger(__name__)


class RemoteTable(ServedTable):
    """What is kept here of a world that is played elsewhere.

    ``home`` and ``number`` say where; they change when that engine is lost, and it has none meanwhile.
    ``saved`` is what it takes to go on with it, beside the mode that its player chose.
    """

    def __init__(self, home: RemoteEngine, number: int, size: tuple[int, int]) -> None:
        super().__init__(size)
        self.home, self.number, self.saved = home, number, SavedGame()
        self._mode: Playback | None = None

    def _say(self, kind: str, *values: Any) -> None:
        """Have something done there, after what was said before; nothing while it is away."""
        if self.engine is not None:
            self.home.say(Call(self.number, kind, values))

    @override
    def seat(self, player: Player, ticket: str, is_new: bool) -> None:
        super().seat(player, ticket, is_new)
        if is_new:
            self.saved, self._mode = SavedGame(), None
        if self.engine is None:
            player.send(_MOVES)
        self._say("seat", ticket, is_new)

    @override
    def leave(self) -> None:
        super().leave()
        self._say("leave")

    @override
    def clear(self) -> None:
        super().clear()
        self.saved = SavedGame()

    @override
    def take_up(self, saved: SavedGame, ticket: str) -> None:
        super().take_up(saved, ticket)
        self.saved = saved

    @override
    def obey(self, message: Message | bytes) -> None:
        super().obey(message)
        if isinstance(message, Playback) and message.mode:
            self._mode = message
        self._say("obey", message)

    def lose(self) -> None:
        """The engine is gone."""
        self.engine = None
        self.saved.stop()
        if self.player is not None:
            self.player.send(_MOVES)

    def settle(self) -> None:
        """Go on where it is now."""
        self.engine = self.home
        if self.ticket:
            self._say("take_up", self.saved, self.ticket)
            if self._mode is not None:
                self._say("obey", self._mode)
            if self.player is not None:
                self._say("seat", self.ticket, False)

    def hear(self, kind: str, value: Any) -> None:
        """What the engine tells of this world."""
        if kind == "lines":
            self.saved.add(*value)
        elif kind == "saved":
            self.saved.take(value)
            if self.keep is not None:
                self.keep(value)
        elif self.player is not None and kind == "send":
            self.player.send(value)
        elif self.player is not None:
            self.player.show(value)


class RemoteEngine:
    """An engine on some node, which is started anew, there or elsewhere, when it is lost.

    ``node`` is where it was started last, as Ray names it, and ``place`` that, or where it is to be started
    next; ``figures`` are those that it told last, with the frames of those before it.
    """

    def __init__(self, fleet: RayFleet) -> None:
        self._fleet, self.is_alive, self.figures = fleet, False, Figures()
        self._before = self.figures
        self.actor: Any = None
        self.place = self.node = ""
        self._calls: list[Call] = []
        self._said = asyncio.Event()

    def forget(self) -> None:
        """Another number plays: what it took before says nothing of what it takes now."""
        self.figures = replace(self.figures, measured=0)

    def say(self, call: Call) -> None:
        """Send something after what was said before."""
        self._calls.append(call)
        self._said.set()

    async def run(self) -> None:
        """Play until cancelled.

        Raises:
            EngineError: it cannot play what it is given, and never could.
        """
        from ray.exceptions import RayActorError, RayError, RayTaskError

        while True:
            try:
                self.place = self.node = await self._begun()
                self.is_alive = True
                self._fleet.settle()
                await self._live(self.actor)
            except (RayError, TimeoutError, asyncio.TimeoutError) as error:
                if isinstance(error, RayActorError) and error.actor_init_failed and not self.node:
                    raise EngineError(cannot_begin(error)) from error
                if isinstance(error, RayTaskError) and not self.node:
                    raise EngineError(f"an engine cannot play: {error.cause}") from error
                reason = (str(error).strip() or f"nothing was heard of it for {_SILENT:g} s").splitlines()[-1]
                _LOG.warning("an engine was lost, another one is started: %s", reason)
                if self.actor is not None:  # one that only failed to begin holds its cores
                    self._fleet.kill(self.actor)
                self.is_alive, self._calls = False, []
                self._before = self.figures = Figures(self.figures.frames, self.figures.late)
                self._fleet.lose(self)
                self._fleet.settle()
                await asyncio.sleep(_PAUSE)

    async def _begun(self) -> str:
        """The node where it plays, as soon as one has room for it."""
        waits = "an engine has not begun after %g seconds: it waits until a node has cores and GPUs to spare"
        told = asyncio.get_running_loop().call_later(_SLOW, _LOG.warning, waits, _SLOW)
        try:
            self.place = await self._fleet.free_node(self)
            self.actor = self._fleet.start_actor(self.place)
            return str(await self.actor.begin.remote())
        finally:
            told.cancel()

    async def end(self) -> None:
        """Have its worlds kept as they are, and end it."""
        from ray.exceptions import RayError

        if self.is_alive:
            with suppress(RayError, TimeoutError, asyncio.TimeoutError):
                for event in await asyncio.wait_for(self.actor.end.remote(), _FAREWELL):
                    self._fleet.hear(self, event)
        if self.actor is not None:
            self._fleet.kill(self.actor)

    async def _live(self, actor: Any) -> None:
        """Talk and listen until either fails."""
        talking = asyncio.create_task(self._talk(actor))
        try:
            while not talking.done():
                events, told = await asyncio.wait_for(actor.hear.remote(), _SILENT)
                frames, late = told.frames + self._before.frames, told.late + self._before.late
                self.figures = replace(told, frames=frames, late=late)
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


class RayFleet(Fleet):
    """Engines on the nodes of a cluster, each with as many tables as one of this process.

    A world whose engine is lost goes on at a table that is free elsewhere, else where the engine is started
    anew: from its last snapshot, and the lines of its record since, which are kept here. The bundle is in the
    same place on every node; ``service`` is that of each engine.
    """

    tables: Sequence[RemoteTable]
    engines: Sequence[RemoteEngine]

    def __init__(
        self, bundle: Bundle, options: GameOptions, service: Service, cluster: EngineOptions
    ) -> None:
        assert cluster.cluster is not None
        ray = connect(cluster.cluster)
        check_place(ray, cluster.cores, cluster.gpus)
        count = cluster.engines or sum(bool(node["Alive"]) for node in ray.nodes())
        cpu = options.session.cpu
        if not cpu.threads:
            cpu = replace(cpu, threads=max(1, int(cluster.cores)))
        options = replace(options, session=replace(options.session, cpu=cpu))
        kind = ray.remote(num_cpus=cluster.cores, num_gpus=cluster.gpus, max_restarts=0)(PlayActor)
        near = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy

        def start_actor(node: str) -> Any:
            there = near(node, soft=True, _spill_on_unavailable=True)
            return kind.options(scheduling_strategy=there).remote(bundle.path.resolve(), options, service)

        self.start_actor: Callable[[str], Any] = start_actor
        self._nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
        self.kill: Callable[[Any], None] = ray.kill
        self.engines = [RemoteEngine(self) for _ in range(count)]
        tokenizer = bundle.manifest.tokenizer
        if tokenizer is None:
            raise UsageError(f"{bundle.path} has no tokenizer, so nothing of it can be shown")
        size = tokenizer.height, tokenizer.width
        numbers = range(service.sessions)
        self.tables = [RemoteTable(engine, number, size) for number in numbers for engine in self.engines]
        self.moves = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def free_node(self, engine: RemoteEngine) -> str:
        """Where the fewest others are, as soon as there is a node at all.

        Nodes that are asked to spread engines do not know of one another's.
        """
        while not (nodes := [str(node["NodeID"]) for node in self._nodes() if node["Alive"]]):
            await asyncio.sleep(_PAUSE)
        held = Counter(one.place for one in self.engines if one is not engine)
        return min(nodes, key=lambda node: held[node])

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
        await asyncio.gather(*(engine.end() for engine in self.engines))

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
        next(one for one in self.tables if (one.home, one.number) == place).hear(event.kind, event.value)

    def lose(self, engine: RemoteEngine) -> None:
        """An engine is gone."""
        for table in self.tables:
            if table.engine is engine:
                table.lose()

    def settle(self) -> None:
        """Have worlds go on that are away: where they were, or at a table that is nobody's."""
        for table in self.tables:
            if table.engine is None and table.home.is_alive:
                table.settle()
        spare = [table for table in self.tables if table.engine is not None and not table.ticket]
        away = [table for table in self.tables if table.engine is None and table.ticket]
        for table, other in zip(away, spare, strict=False):
            table.home, other.home = other.home, table.home
            table.number, other.number, other.engine = other.number, table.number, None
            table.settle()
            self.moves += 1
