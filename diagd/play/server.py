"""Page and socket from one port: an asyncio loop in front of the thread of the game loop."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field
from typing_extensions import override

from diagd.errors import DiagdError, UsageError, require
from diagd.options import checked, setting
from diagd.play import messages
from diagd.play.messages import Ack, Hello, without_paths
from diagd.play.room import Room
from diagd.play.site import SOCKET, Answer, Site, cannot_listen, page_address
from diagd.play.table import Fleet, Player, ServedTable, Update, packed

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection
    from websockets.http11 import Request, Response

MAX_UNSEEN: Final = 2
"""Updates that may be on their way; a slow browser gets fewer, never older ones."""

WARNED_SECONDS: Final = 30.0
"""Before the end of a game that players are told."""

OPEN_METRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_REFUSED, _TOO_MANY, _OVER = 4003, 4029, 4008
_LOG = logging.getLogger("diagd.play")


@checked
class Limits:
    """Bounds of what one connection may do, and how long a seat is anybody's."""

    idle: float = setting(
        "of play: seconds a player may press nothing, or inf", 300, gt=0, allow_inf_nan=True
    )
    game: float = setting("of play: seconds of a game, or inf", 900, gt=0, allow_inf_nan=True)
    drain: float = setting("of play: seconds that players have after SIGTERM", 30, ge=0)
    hello_seconds: float = Field(5.0, gt=0)
    messages_per_second: float = Field(240.0, gt=0)
    texts: int = Field(64, ge=1)


@dataclass(frozen=True)
class Address:
    """Where the server listens, also led to by ``public`` ones; the token is what lets somebody in."""

    host: str = "127.0.0.1"
    port: int = 8765
    public: tuple[str, ...] = ()
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in ("127.0.0.1", "::1", "localhost")


class Client(Player):
    """One connection: what it is told, and what it may say."""

    def __init__(self, limits: Limits, connection: ServerConnection) -> None:
        self._most, self._connection = limits.messages_per_second, connection
        self._texts: deque[str | bytes] = deque(maxlen=limits.texts)
        self._newest: Update | None = None
        self._unseen: deque[int] = deque()
        self._wake = asyncio.Event()
        self._allowance, self._counted = self._most, time.monotonic()
        self._closing: asyncio.Future[None] | None = None

    @override
    def send(self, message: dict[str, Any] | bytes) -> None:
        """Send a message after those before it; the oldest is dropped where too many wait."""
        self._texts.append(message if isinstance(message, bytes) else json.dumps(message))
        self._wake.set()

    @override
    def show(self, update: Update) -> None:
        """Send an update when the page has kept up, unless a newer one comes before."""
        self._newest = update.instead_of(self._newest)
        self._wake.set()

    def seen(self, number: int) -> None:
        """The page drew an update."""
        while self._unseen and self._unseen[0] <= number:
            self._unseen.popleft()
        self._wake.set()

    @override
    def close(self, code: int, reason: str) -> None:
        """End the connection, from outside of its own task."""
        self._closing = asyncio.ensure_future(self._connection.close(code, reason))

    async def send_all(self) -> None:
        """Send until the connection ends."""
        from websockets.exceptions import ConnectionClosed

        with suppress(ConnectionClosed):
            while await self._wake.wait():
                self._wake.clear()
                while self._texts:
                    await self._connection.send(self._texts.popleft())
                if self._newest and len(self._unseen) < MAX_UNSEEN:
                    update, self._newest = self._newest, None
                    self._unseen.append(update.header["id"])
                    await self._connection.send(packed(*update))

    def may_speak(self) -> bool:
        """Count a message; False where there were too many of late."""
        now = time.monotonic()
        self._allowance = min(self._most, self._allowance + (now - self._counted) * self._most) - 1
        self._counted = now
        return self._allowance >= 0


class Server:
    """Serves worlds, each to one player.

    ``rate`` is of the `Room`. The fleet is closed when serving ends.

    Raises:
        DependencyError: websockets is not installed.
    """

    def __init__(self, fleet: Fleet, address: Address, limits: Limits, rate: float | None = None) -> None:
        require("websockets", extra="play", purpose="play in a browser")
        self.address, self.limits, self.fleet = address, limits, fleet
        self.tables = fleet.tables
        self.room = Room(fleet.tables, rate)
        self._drains: float | None = None  # when the last player has to go
        self._ended = asyncio.Event()

    async def run(self, started: Callable[[str], None]) -> None:
        """Serve until it is ended or cancelled.

        ``started`` is given the address of the page once it is served.

        Raises:
            UsageError: nobody can listen there.
        """
        try:
            await self._run(started)
        except (OSError, UnicodeError) as error:
            raise cannot_listen(self.address.host, self.address.port, error) from None

    async def _run(self, started: Callable[[str], None]) -> None:
        from websockets.asyncio.server import serve

        quiet = logging.getLogger("diagd.play.websockets")
        quiet.setLevel(logging.CRITICAL)
        height, width = self.tables[0].size
        most = max(messages.MAX_TEXT, height * width * 4) + 1024
        async with serve(
            self._serve,
            self.address.host,
            self.address.port,
            process_request=self._answer,
            max_size=most,
            max_queue=8,
            close_timeout=2,
            compression=None,
            server_header=None,
            logger=quiet,
        ) as listening:
            port = next(iter(listening.sockets)).getsockname()[1]
            self._site = Site(self.address.host, port, self.address.public)
            self.fleet.start(asyncio.get_running_loop())
            started(f"{page_address(self.address.host, port, self.address.public)}/#{self.address.token}")
            try:
                while not self._ended.is_set() and (self._drains is None or self._playing):
                    with suppress(TimeoutError, asyncio.TimeoutError):
                        await asyncio.wait_for(self._ended.wait(), 1)
                    self.fleet.check()
                    self._look_around(time.monotonic())
            finally:
                await self.fleet.close()

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        host, origin = request.headers.get("Host"), request.headers.get("Origin")
        if refusal := self._site.refusal(request.path, host, origin):
            return connection.respond(403, f"{refusal}\n")
        if request.path == SOCKET:
            return None
        status, headers, text = self._status(request.path.partition("?")[0]) or self._site.answer(
            request.path, host
        )
        response = connection.respond(status, text)
        for name, value in headers.items():
            response.headers.pop(name, None)  # else there would be two
            response.headers[name] = value
        return response

    async def _serve(self, connection: ServerConnection) -> None:
        from websockets.exceptions import ConnectionClosed

        client = Client(self.limits, connection)
        with suppress(ConnectionClosed):
            hello = await self._greet(connection)
            if hello is None:
                await connection.close(_REFUSED, "the token is wrong; open the printed address")
                return
            if not self.room.enter(client, hello.ticket):
                await connection.close(_TOO_MANY, "too many wait already")
                return
            sender = asyncio.create_task(client.send_all())
            try:
                async for data in connection:
                    if not client.may_speak():
                        await connection.close(_TOO_MANY, "too many messages a second")
                        break
                    self._hear(client, data)
            finally:
                sender.cancel()
                self.room.leave(client)

    async def _greet(self, connection: ServerConnection) -> Hello | None:
        """The first message, where it is one and has the token."""
        try:
            data = await asyncio.wait_for(connection.recv(), self.limits.hello_seconds)
            hello = messages.parse(data) if isinstance(data, str) else None
        except (TimeoutError, asyncio.TimeoutError, UsageError):
            return None
        if not isinstance(hello, Hello) or hello.version != messages.VERSION:
            return None
        return hello if hmac.compare_digest(hello.token.encode(), self.address.token.encode()) else None

    @property
    def _playing(self) -> int:
        return sum(table.player is not None for table in self.tables)

    def drain(self) -> None:
        """Seat nobody any more, and end when all have left, or their time is over; asked again, no later."""
        self._drains = self._drains or time.monotonic() + self.limits.drain
        self.room.is_closing = True

    def end(self) -> None:
        """End at once; asked again, no sooner."""
        self._ended.set()

    def _look_around(self, now: float) -> None:
        """Once a second: whose time is over, and who is next."""
        for table in self.tables:
            if (player := table.player) is None:
                continue
            left, why = self._left(table, now)
            if left <= 0:
                self.room.clear(table)
                player.close(_OVER, f"{why}; open the address again to play on")
            elif left <= WARNED_SECONDS:
                player.send({"type": "ends", "seconds": round(left), "why": why})
        self.room.shed()
        self.room.turn()

    def _left(self, table: ServedTable, now: float) -> tuple[float, str]:
        """Seconds that a player has, and what ends them."""
        ends = [
            (table.heard + self.limits.idle, "nothing was pressed for long"),
            (table.taken + self.limits.game, "the game was as long as games are here"),
        ]
        if self._drains is not None:
            ends.append((self._drains, "the server is being closed"))
        end, why = min(ends)
        return end - now, why

    def _status(self, path: str) -> Answer | None:
        """What those are told who look after a server; None: the page is asked for."""
        if path == "/metrics":
            return HTTPStatus.OK, {"Content-Type": OPEN_METRICS, "Cache-Control": "no-store"}, self._metrics()
        free = any(table.engine is not None and not table.ticket for table in self.tables)
        told = {
            "/health": ("alive", self.fleet.is_alive),
            "/ready": ("free seat", free and self._drains is None),
        }
        if path not in told:
            return None
        what, holds = told[path]
        status = HTTPStatus.OK if holds else HTTPStatus.SERVICE_UNAVAILABLE
        return status, {"Cache-Control": "no-store"}, f"{what} {holds}\n"

    def _metrics(self) -> str:
        """Figures as OpenMetrics 1.0 has them."""
        engines = [engine.figures for engine in self.fleet.engines]
        p50, p95 = (max((getattr(one, name) for one in engines), default=0.0) for name in ("p50", "p95"))
        figures: tuple[tuple[str, str, str, float], ...] = (
            ("seats", "gauge", "worlds that can be played", len(self.tables)),
            ("players", "gauge", "who plays", self._playing),
            ("waiting", "gauge", "who waits", len(self.room.waiting)),
            ("frames", "counter", "decoded", sum(one.frames for one in engines)),
            ("refusals", "counter", "times a free seat was not given, to keep the rate", self.room.refused),
            ("put_back", "counter", "players on trial who were one too many", self.room.returned),
            ("late", "counter", "ticks that were missed", sum(one.late for one in engines)),
            ("rate", "gauge", "frames a second of each that are held; 0: what there is", self.room.rate or 0),
            ("frame_p50_seconds", "gauge", "of the passes and pictures of all", p50),
            ("frame_p95_seconds", "gauge", "of the passes and pictures of all", p95),
            *self.fleet.metrics(),
        )
        lines = []
        for name, kind, what, value in figures:
            suffix = "_total" if kind == "counter" else ""
            lines += [f"# TYPE diagd_{name} {kind}", f"# HELP diagd_{name} {what}"]
            lines.append(f"diagd_{name}{suffix} {value}")
        return "\n".join([*lines, "# EOF", ""])

    def _hear(self, client: Client, data: str | bytes) -> None:
        """A message of a client; whatever it is, the server goes on."""
        try:
            message = data if isinstance(data, bytes) else messages.parse(data)
            if isinstance(message, Ack):
                client.seen(message.id)
            elif (table := self.room.table_of(client)) is not None:
                table.obey(message)
        except DiagdError as error:
            client.send({"type": "error", "text": without_paths(str(error))})
