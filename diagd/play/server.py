"""Page and socket from one port: an asyncio loop in front of the stage's thread."""

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
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from diagd.errors import DiagdError, UsageError, require
from diagd.play import messages
from diagd.play.controls import Inputs
from diagd.play.game import Game, Shown
from diagd.play.messages import Ack, Hello, Input, Message, without_paths
from diagd.play.pictures import PictureEncoder, Pictures
from diagd.play.room import Room
from diagd.play.site import SOCKET, Site
from diagd.play.stage import Stage, Update
from diagd.runtime.actions import describe

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection
    from websockets.http11 import Request, Response

MAX_UNSEEN: Final = 2
"""Updates that may be on their way; a slow browser gets fewer, never older ones."""

AUDITED: Final = 16
"""Frames that are compared with next-token prediction at a time."""

_REFUSED, _PUT_OUT, _TOO_MANY = 4003, 4001, 4029
_LOG = logging.getLogger("diagd.play")


@dataclass(frozen=True)
class Limits:
    """Bounds of what one connection may do."""

    hello_seconds: float = 5.0
    messages_per_second: float = 240.0
    texts: int = 64


@dataclass(frozen=True)
class Address:
    """Where the server listens; the token is what lets somebody in."""

    host: str = "127.0.0.1"
    port: int = 8765
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in ("127.0.0.1", "::1", "localhost")


def packed(header: dict[str, Any], parts: list[bytes]) -> bytes:
    """A binary message: length of the header (uint32, big endian), header as JSON, then the parts."""
    head = json.dumps(header | {"sizes": [len(part) for part in parts]}).encode()
    return len(head).to_bytes(4, "big") + head + b"".join(parts)


class Client:
    """One connection: what it is told, and what it may say."""

    def __init__(self, server: Server, connection: ServerConnection) -> None:
        self._server, self._connection = server, connection
        self._texts: deque[str | bytes] = deque(maxlen=server.limits.texts)
        self._newest: tuple[int, bytes] | None = None
        self._unseen: deque[int] = deque()
        self._wake = asyncio.Event()
        self._allowance, self._counted = server.limits.messages_per_second, time.monotonic()

    def tell(self, message: dict[str, Any] | bytes) -> None:
        """Send a message after those before it; the oldest is dropped where too many wait."""
        self._texts.append(message if isinstance(message, bytes) else json.dumps(message))
        self._wake.set()

    def show(self, number: int, update: bytes) -> None:
        """Send an update when the page has kept up, unless a newer one comes before."""
        self._newest = number, update
        self._wake.set()

    def seen(self, number: int) -> None:
        """The page drew an update."""
        while self._unseen and self._unseen[0] <= number:
            self._unseen.popleft()
        self._wake.set()

    def seated(self, ticket: str, is_new: bool) -> None:
        """See ``Guest``."""
        self._server.seat(self, ticket, is_new)

    def waits(self, place: int) -> None:
        """See ``Guest``."""
        self.tell({"type": "waiting", "place": place})

    def put_out(self) -> None:
        """See ``Guest``."""
        self._server.close_later(self._connection, _PUT_OUT, "the world was opened elsewhere")

    async def send_all(self) -> None:
        """Send until the connection ends."""
        from websockets.exceptions import ConnectionClosed

        with suppress(ConnectionClosed):
            await self._send()

    async def _send(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._texts:
                await self._connection.send(self._texts.popleft())
            if self._newest and len(self._unseen) < MAX_UNSEEN:
                number, update = self._newest
                self._newest = None
                self._unseen.append(number)
                await self._connection.send(update)

    def may_speak(self) -> bool:
        """Count a message; False where there were too many of late."""
        most, now = self._server.limits.messages_per_second, time.monotonic()
        self._allowance = min(most, self._allowance + (now - self._counted) * most) - 1
        self._counted = now
        return self._allowance >= 0


class Server:
    """Serves one game.

    Args:
        game: handed to the stage, which closes it.
        inputs: of the player.
        address: where to listen.
        rate: frames a second to begin with.
        watch: sees every picture too, in the stage's thread.
        limits: of connections.

    Raises:
        DependencyError: websockets is not installed.
    """

    def __init__(
        self,
        game: Game,
        inputs: Inputs,
        address: Address,
        rate: float,
        watch: Callable[[Pictures], None] | None = None,
        limits: Limits | None = None,
    ) -> None:
        require("websockets", extra="play", purpose="play in a browser")
        spec = game.view.codec.spec
        self.address, self.limits = address, limits or Limits()
        self._inputs, self._game, self._watch = inputs, game, watch
        self._encode = PictureEncoder(spec.height, spec.width)
        self._size = spec.height, spec.width
        self._stage = Stage(game, inputs, self._show, self._fail, rate)
        self._room: Room[Client] = Room()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closings: set[asyncio.Task[None]] = set()
        self._number = 0
        self._prompt = game.prompts[0]
        self._gallery: bytes | None = None

    async def run(self, started: Callable[[str], None]) -> None:
        """Serve until cancelled.

        Args:
            started: is given the address of the page once it is served.

        Raises:
            UsageError: nobody can listen there.
        """
        try:
            await self._run(started)
        except OSError as error:
            raise UsageError(
                f"cannot listen on {self.address.host}, port {self.address.port}: {error.strerror or error}; "
                "choose another --port or --host"
            ) from None

    async def _run(self, started: Callable[[str], None]) -> None:
        from websockets.asyncio.server import serve

        self._loop = asyncio.get_running_loop()
        quiet = logging.getLogger("diagd.play.websockets")
        quiet.setLevel(logging.CRITICAL)
        most = max(messages.MAX_TEXT, self._size[0] * self._size[1] * 4) + 1024
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
            self._site = Site(self.address.host, port)
            name = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
            self._stage.start()
            self._stage.post(self._begin)
            started(f"http://{name}:{port}/#{self.address.token}")
            try:
                while True:
                    await asyncio.sleep(1)
                    self._room.turn()
            finally:
                await asyncio.to_thread(self._stage.close)

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        from websockets.datastructures import Headers
        from websockets.http11 import Response

        host, origin = request.headers.get("Host"), request.headers.get("Origin")
        if refusal := self._site.refusal(request.path, host, origin):
            return connection.respond(403, f"{refusal}\n")
        if request.path == SOCKET:
            return None
        answer = self._site.answer(request.path, str(host))
        headers = Headers(answer.headers | {"Content-Length": str(len(answer.body)), "Connection": "close"})
        return Response(answer.status.value, answer.status.phrase, headers, answer.body)

    async def _serve(self, connection: ServerConnection) -> None:
        from websockets.exceptions import ConnectionClosed

        client = Client(self, connection)
        with suppress(ConnectionClosed):
            hello = await self._greet(connection)
            if hello is None:
                await connection.close(_REFUSED, "the token is wrong; open the printed address")
                return
            if not self._room.enter(client, hello.ticket):
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
                self._leave(client)

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

    def _leave(self, client: Client) -> None:
        was_player = client is self._room.player
        self._room.leave(client)
        if was_player:
            self._inputs.release()
            self._stage.is_watched = False

    def seat(self, client: Client, ticket: str, is_new: bool) -> None:
        """Let a client play."""
        self._inputs.release()
        client.tell(self._welcome(ticket))
        if self._gallery is not None:
            client.tell(self._gallery)
        self._post(client, lambda: self._reset(self._game.prompts[0]) if is_new else self._look())
        self._stage.is_watched = True
        self._stage.wake()

    def close_later(self, connection: ServerConnection, code: int, reason: str) -> None:
        """Close a connection from outside of its own task."""
        task = asyncio.ensure_future(connection.close(code, reason))
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)

    def _welcome(self, ticket: str) -> dict[str, Any]:
        manifest, layout = self._game.bundle.manifest, self._game.session.layout
        return {
            "type": "welcome",
            "version": messages.VERSION,
            "ticket": ticket,
            "name": manifest.name,
            "licence": manifest.licence,
            "size": self._size,
            "grid": [layout.rows, layout.columns],
            "cover": self._game.view.codec.spec.cover,
            "controls": self._inputs.controls.model_dump(mode="json"),
            "has_actions": manifest.actions is not None,
            "autopilot": self._game.session.acts,
            "fps": manifest.frames_per_second,
        }

    def _hear(self, client: Client, data: str | bytes) -> None:
        """A message of a client; whatever it is, the server goes on."""
        try:
            if isinstance(data, bytes):
                self._upload(client, data)
                return
            message = messages.parse(data)
            if isinstance(message, Ack):
                client.seen(message.id)
            elif client is self._room.player:
                self._obey(client, message)
        except DiagdError as error:
            client.tell({"type": "error", "text": without_paths(str(error))})

    def _obey(self, client: Client, message: Message) -> None:
        """What the player says."""
        if isinstance(message, Input):
            flown = self._inputs.autopilot
            self._inputs.update(message.keys, (message.dy, message.dx), message.axes, message.t)
            if flown and not self._inputs.autopilot:
                self._post(client, lambda: None)
            self._stage.wake()
        elif isinstance(message, messages.Pace):
            self._stage.mode = message.mode or self._stage.mode
            self._stage.pacer.asked = message.rate or self._stage.pacer.asked
            self._post(client, lambda: None)
        elif isinstance(message, messages.Autopilot):
            self._inputs.autopilot = message.on and self._game.session.acts
            self._post(client, lambda: None)
        elif isinstance(message, messages.Save):
            self._post(client, self._send_record)
        elif not isinstance(message, Hello | Ack):
            self._post(client, lambda: self._command(message))

    def _command(self, message: messages.Command) -> None:
        """Move the world, in the stage's thread."""
        game = self._game
        if isinstance(message, messages.Reset):
            number = message.prompt
            if number is not None and number >= len(game.prompts):
                raise UsageError(f"no prompt has the number {number}; there are {len(game.prompts)}")
            self._reset(self._prompt if number is None else game.prompts[number])
        elif isinstance(message, messages.Rewind):
            self._stage.look(game.rewind(message.frames))
        elif isinstance(message, messages.Branch):
            game.branch()
        elif isinstance(message, messages.Visit):
            self._stage.look(game.visit(message.number))
        elif isinstance(message, messages.Choose):
            game.choose(message.settings)
        elif isinstance(message, messages.Audit):
            frames, share = game.audit(AUDITED)
            self._call(self._tell_player, {"type": "audit", "frames": frames, "share": share})

    def _send_record(self) -> None:
        self._call(self._tell_player, packed({"kind": "record"}, [self._game.record.read()]))

    def _reset(self, prompt: Any) -> None:
        self._prompt = prompt
        self._stage.look(self._game.reset(prompt))

    def _look(self) -> None:
        if self._game.known:
            self._stage.look(self._game.look())

    def _upload(self, client: Client, data: bytes) -> None:
        """A picture of the world's size, as RGBA, to begin a world from."""
        height, width = self._size
        if client is not self._room.player:
            return
        if len(data) != height * width * 4:
            raise UsageError(f"a picture has {len(data)} bytes; expected RGBA of {width} x {height} pixels")
        pixels = np.frombuffer(data, np.uint8).reshape(1, height, width, 4)[..., :3]
        codec = self._game.view.codec
        self._post(client, lambda: self._reset(codec.encode(np.ascontiguousarray(pixels))))

    def _post(self, client: Client, command: Callable[[], object]) -> None:
        """Run a command between two frames; its error goes to the client, and then how things stand."""

        def run() -> None:
            try:
                command()
            except DiagdError as error:
                self._call(client.tell, {"type": "error", "text": without_paths(str(error))})
            self._call(client.tell, self._state())

        try:
            self._stage.post(run)
        except UsageError as error:
            client.tell({"type": "error", "text": str(error)})

    def _state(self) -> dict[str, Any]:
        game, stage = self._game, self._stage
        marks = [{"number": m.number, "parent": m.parent, "known": m.known} for m in game.marks.values()]
        return {
            "type": "state",
            "mode": stage.mode,
            "rate": stage.pacer.asked,
            "settings": game.settings.model_dump(mode="json"),
            "marks": marks,
            "here": game.here,
            "autopilot": self._inputs.autopilot,
            "known": game.known,
        }

    def _begin(self) -> None:
        """First of all in the stage's thread: pictures of the prompts, and a world."""
        codec = self._game.view.codec
        pictures = [list(codec.decode(iter(prompt)))[-1] for prompt in self._game.prompts]
        kind = self._encode.kind
        self._gallery = packed({"kind": "gallery", "type": kind}, [self._encode(one) for one in pictures])
        self._call(self._tell_player, self._gallery)
        self._reset(self._prompt)

    def _show(self, update: Update) -> None:
        """Encode an update and leave it for the player; in the stage's thread."""
        if self._watch is not None:
            self._watch(update.pictures)
        began = time.perf_counter()
        parts = [self._encode(picture) for picture in update.pictures]
        header: dict[str, Any] = {"kind": "frame", "type": self._encode.kind, "known": update.known}
        if update.shown is not None:
            header |= self._figures(update.shown, time.perf_counter() - began)
        self._call(self._show_player, header, parts)

    def _figures(self, shown: Shown, encode: float) -> dict[str, Any]:
        pacer, taken = self._stage.pacer, shown.taken
        spent = {"wait": taken.waited, "decode": shown.decode, "pixels": shown.pixels, "encode": encode}
        return {
            "echo": taken.echo,
            "action": self._done(shown),
            "ms": {name: round(1e3 * seconds, 2) for name, seconds in spent.items()},
            "passes": shown.frame.steps,
            "fps": round(pacer.fps, 1),
            "p50": round(1e3 * pacer.percentile(50), 1),
            "p95": round(1e3 * pacer.percentile(95), 1),
            "rate": round(pacer.rate, 1),
            "late": pacer.late,
        }

    def _done(self, shown: Shown) -> dict[str, Any]:
        """The action that led to a frame, the player's or the model's."""
        codec = self._game.bundle.manifest.actions
        if shown.taken.ids is not None or codec is None:
            return shown.taken.action
        return describe(codec, shown.frame.action)

    def _show_player(self, header: dict[str, Any], parts: list[bytes]) -> None:
        self._number += 1
        if self._room.player is not None:
            self._room.player.show(self._number, packed(header | {"id": self._number}, parts))

    def _tell_player(self, message: dict[str, Any] | bytes) -> None:
        if self._room.player is not None:
            self._room.player.tell(message)

    def _fail(self, text: str) -> None:
        """The world stands still; in the stage's thread."""
        self._call(self._tell_player, {"type": "error", "text": without_paths(text)})
        self._call(self._tell_player, self._state())

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run in the loop's thread."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function, *arguments)
