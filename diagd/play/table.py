"""One world and who plays it, what they say and are shown; and all worlds, wherever they are played."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import numpy as np
from typing_extensions import override

from diagd.errors import DiagdError, UsageError
from diagd.play import messages
from diagd.play.controls import Inputs
from diagd.play.game import Game, SavedGame, Shown
from diagd.play.messages import Ack, Hello, Input, Message, without_paths
from diagd.play.pictures import Pictures, picture_encoder
from diagd.play.record import PlaySettings
from diagd.play.stage import Engine, GameLoop, Stage
from diagd.runtime.actions import describe

EVERY: Final = 60
"""Frames between two snapshots of a world."""

AUDITED: Final = 16
"""Frames that are compared with next-token prediction at a time."""

FILMED: Final = 1200
"""Frames of a video that is asked for; the world stands still until it is written."""

REST: Final = 20
"""As rates are held for the slowest frame in twenty."""

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


def packed(header: dict[str, Any], parts: list[bytes]) -> bytes:
    """A binary message: length of the header (uint32, big endian), header as JSON, then the parts."""
    head = json.dumps(header | {"sizes": [len(part) for part in parts]}).encode()
    return len(head).to_bytes(4, "big") + head + b"".join(parts)


class Update(NamedTuple):
    """A look at a world: what is told of it, and its pictures."""

    header: dict[str, Any]
    pictures: list[bytes]

    def instead_of(self, dropped: Update | None) -> Update:
        """Stand in for one that nobody saw: what was pressed ahead of that is seen here first."""
        echo = None if dropped is None else dropped.header.get("echo")
        if echo is None or "echo" not in self.header:
            return self
        return Update(self.header | {"echo": echo}, self.pictures)


class Player(Protocol):
    """Somebody in front of a table."""

    def send(self, message: dict[str, Any] | bytes) -> None:
        """Send a message after those before it."""

    def show(self, update: Update) -> None:
        """Send an update, unless a newer one comes before."""

    def close(self, code: int, reason: str) -> None:
        """End the connection; one that is far away is ended there."""
        return


class ServedTable:
    """What a server sees of a table, wherever its world is played.

    Attributes:
        size: height and width of its pictures.
        engine: None while it has none.
        player: who plays; None: nobody.
        ticket: of whose world it is; "": of nobody's.
        taken, left: when it became theirs, and when they went away or came back last (``time.monotonic``).
        heard: when they last held a key or said something.
        tried: when it last began to take what it takes of its engine, by a new player or other settings.
        keep: is given snapshots of its world, and None when it is nobody's, in any thread; None: nothing is.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.engine: Engine | None = None
        self.player: Player | None = None
        self.ticket, self.taken, self.left, self.heard, self.tried = "", 0.0, 0.0, 0.0, 0.0
        self.keep: Callable[[bytes | None], None] | None = None

    def seat(self, player: Player, ticket: str, is_new: bool) -> None:
        """Let somebody play; ``is_new``: the world is to begin anew."""
        self.player, self.heard, self.ticket = player, time.monotonic(), ticket
        self._forget()

    def leave(self) -> None:
        """Nobody plays any more."""
        self.player = None
        self._forget()

    def _forget(self) -> None:
        if self.engine is not None:
            self.engine.forget()

    def clear(self) -> None:
        """Its world is nobody's any more."""
        self.leave()
        self.ticket = ""
        if self.keep is not None:
            self.keep(None)

    def take_up(self, saved: SavedGame, ticket: str) -> None:
        """Go on with a world that was played elsewhere, as its player comes back."""
        self.ticket, self.taken = ticket, time.monotonic()
        self.left = self.taken

    def obey(self, message: Message | bytes) -> None:
        """What the player says, or a picture of the world's size, as RGBA, to begin a world from."""
        now = time.monotonic()
        if not (isinstance(message, Input) and message.is_still):
            self.heard = now
        if isinstance(message, messages.Choose):
            self.tried = now


class Table(ServedTable):
    """One world, its player and what stands between them.

    Where it is ``paced`` the player may ask for another rate; ``every`` counts frames between two snapshots.
    ``loop`` is of the players' connections.
    """

    def __init__(
        self, game: Game, inputs: Inputs, rate: float, *, paced: bool = True, every: int = EVERY
    ) -> None:
        super().__init__(game.view.codec.spec.size)
        self.game, self.stage = game, Stage(game, inputs, self._show, self._fail, rate)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._inputs, self._paced, self._rate = inputs, paced, rate
        self._kind, self._encode = picture_encoder(*self.size)
        self._number, self._whose = 0, ""
        self._gallery: bytes | None = None
        self._every, self._since, self._rested = every, 0, 0.0

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make ready for players, whose connections belong to a loop."""
        self.loop = loop
        self.stage.post(self._begin)

    @override
    def seat(self, player: Player, ticket: str, is_new: bool) -> None:
        super().seat(player, ticket, is_new)
        self._inputs.release()
        player.send(self._welcome())
        if self._gallery is not None:
            player.send(self._gallery)
        if is_new:
            self.stage.mode, self.stage.pacer.asked = "live", self._rate
        self._post(self._renew if is_new else self._look, ticket)
        self.stage.is_watched = True
        self.stage.wake()

    @override
    def leave(self) -> None:
        super().leave()
        self._inputs.release()
        self.stage.is_watched = False

    @override
    def take_up(self, saved: SavedGame, ticket: str) -> None:
        super().take_up(saved, ticket)
        self.stage.mode = "live"

        def restore() -> None:
            self._whose = ticket
            if saved.snapshot is None and not saved.lines:  # it never began
                return self._renew()
            try:
                saved.restore(self.game)
            except DiagdError as error:
                _LOG.warning("a world that was kept cannot go on, it begins anew: %s", error)
                self._fail(f"the world cannot go on, it begins anew: {error}")
                self._renew()

        self.stage.post(restore, always=True)

    def _welcome(self) -> dict[str, Any]:
        manifest, layout = self.game.bundle.manifest, self.game.session.layout
        return {
            "type": "welcome",
            "version": messages.VERSION,
            "ticket": self.ticket,
            "name": manifest.name,
            "licence": manifest.licence,
            "size": self.size,
            "grid": [layout.rows, layout.columns],
            "cover": self.game.view.codec.spec.cover,
            "controls": self._inputs.controls.model_dump(mode="json"),
            "has_actions": manifest.actions is not None,
            "film": True,
            "autopilot": self.game.session.acts,
            "fps": manifest.frames_per_second,
        }

    @override
    def obey(self, message: Message | bytes) -> None:
        super().obey(message)
        if isinstance(message, bytes):
            self._upload(message)
        elif isinstance(message, Input):
            flown = self._inputs.autopilot
            self._inputs.update(message.keys, (message.dy, message.dx), message.axes, message.t)
            if flown and not self._inputs.autopilot:
                self._post(lambda: None)
            self.stage.wake()
        elif isinstance(message, messages.Playback):
            self.stage.mode = message.mode or self.stage.mode
            if self._paced and message.rate:
                self.stage.pacer.asked = message.rate
            self._post(lambda: None)
        elif isinstance(message, messages.Autopilot):
            self._inputs.autopilot = message.on and self.game.session.acts
            self._post(lambda: None)
        elif not isinstance(message, Hello | Ack):
            self._post(lambda: self._command(message))

    def _command(self, message: messages.Command) -> None:
        """Move the world, in the stage's thread."""
        game = self.game
        if isinstance(message, messages.Reset):
            number = message.prompt
            if number is not None and number >= len(game.prompts):
                raise UsageError(f"no prompt has the number {number}; there are {len(game.prompts)}")
            self._reset(game.start if number is None else game.prompts[number])
        elif isinstance(message, messages.Rewind):
            self.stage.look(game.rewind(message.frames))
        elif isinstance(message, messages.Visit):
            self.stage.look(game.visit(message.number))
        elif isinstance(message, messages.Choose):
            game.choose(message.settings)
        elif message.type == "branch":
            game.branch()
        elif message.type == "save":
            self._call(self._send_player, packed({"kind": "record"}, [game.record.read()]))
        elif message.type == "film":
            film = self._rarely(lambda: game.film(FILMED))
            self._call(self._send_player, packed({"kind": "film"}, [film]))
        elif message.type == "audit":
            frames, share = self._rarely(lambda: game.audit(AUDITED))
            self._call(self._send_player, {"type": "audit", "frames": frames, "share": share})

    def _rarely(self, work: Callable[[], T]) -> T:
        """Have done what takes long, by those who share an engine once in ``REST`` times what it takes."""
        began = time.monotonic()
        if began < self._rested:
            seconds = math.ceil(self._rested - began)
            raise UsageError(f"all worlds here stand still for this; ask again in {seconds} seconds")
        result = work()
        if not self._paced:
            self._rested = time.monotonic() + REST * (time.monotonic() - began)
        return result

    def _reset(self, prompt: Any) -> None:
        self.stage.look(self.game.reset(prompt))
        self._snapshot()

    def _snapshot(self) -> None:
        self._since = 0
        if self.keep is not None and self.ticket:
            self.keep(self.game.snapshot())

    def _renew(self) -> None:
        """Begin as if nobody had played before."""
        self.game.settings = PlaySettings.of(self.game.bundle.manifest)
        self._reset(self.game.prompts[0])

    def _look(self) -> None:
        if self.game.known:
            self.stage.look(self.game.look())

    def _upload(self, data: bytes) -> None:
        height, width = self.size
        if len(data) != height * width * 4:
            raise UsageError(f"a picture has {len(data)} bytes; expected RGBA of {width} x {height} pixels")
        pixels = np.frombuffer(data, np.uint8).reshape(1, height, width, 4)[..., :3]
        codec = self.game.view.codec
        self._post(lambda: self._reset(codec.encode(np.ascontiguousarray(pixels))))

    def _post(self, command: Callable[[], object], seated: str = "") -> None:
        """Run a command between two frames; its error goes to the player, and then how things stand.

        From the one of the ticket that is ``seated`` on, what the world shows and tells is for that player.
        """

        def run() -> None:
            self._whose = seated or self._whose
            try:
                command()
            except DiagdError as error:
                self._fail(str(error))
            else:
                self._call(self._send_player, self._state())

        try:
            self.stage.post(run, always=bool(seated))
        except UsageError as error:
            self._send_player({"type": "error", "text": str(error)})

    def _state(self) -> dict[str, Any]:
        game, stage = self.game, self.stage
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
        codec = self.game.view.codec
        pictures = [list(codec.decode(iter(prompt)))[-1] for prompt in self.game.prompts]
        self._gallery = packed({"kind": "gallery", "type": self._kind}, list(map(self._encode, pictures)))
        self._call(self._send_player, self._gallery)
        if not self.game.known:  # else it was taken up
            self._reset(self.game.start)

    def _show(self, pictures: Pictures, shown: Shown | None) -> None:
        """Encode pictures and leave them for the player; in the stage's thread."""
        began = time.perf_counter()
        parts = list(map(self._encode, pictures))
        header: dict[str, Any] = {"kind": "frame", "type": self._kind, "known": self.game.known}
        if shown is not None:
            header |= self._figures(shown, time.perf_counter() - began)
            self._since += 1
            if self._since >= self._every:
                self._snapshot()
        self._call(self._show_player, header, parts)

    def _figures(self, shown: Shown, encode: float) -> dict[str, Any]:
        pacer, taken, codec = self.stage.pacer, shown.taken, self.game.bundle.manifest.actions
        action: dict[str, Any] = taken.action
        if taken.ids is None and codec is not None:  # the model played
            action = describe(codec, shown.frame.action)
        spent = {"wait": taken.waited, "decode": shown.decode, "pixels": shown.pixels, "encode": encode}
        return {
            "echo": taken.echo,
            "action": action,
            "ms": {name: round(1e3 * seconds, 2) for name, seconds in spent.items()},
            "passes": shown.frame.steps,
            "fps": round(pacer.fps, 1),
            "p50": round(1e3 * pacer.percentile(50), 1),
            "p95": round(1e3 * pacer.percentile(95), 1),
            "rate": round(pacer.rate, 1),
            "late": pacer.late,
        }

    def _show_player(self, header: dict[str, Any], parts: list[bytes]) -> None:
        self._number += 1
        if self.player is not None:
            self.player.show(Update(header | {"id": self._number}, parts))

    def _send_player(self, message: dict[str, Any] | bytes) -> None:
        if self.player is not None:
            self.player.send(message)

    def _fail(self, text: str) -> None:
        """The world stands still; in the stage's thread."""
        self._call(self._send_player, {"type": "error", "text": without_paths(text)})
        self._call(self._send_player, self._state())

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run in the loop's thread, unless somebody is seated there whose world has not begun."""
        whose = self._whose

        def run() -> None:
            if whose in ("", self.ticket):
                function(*arguments)

        assert self.loop is not None
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(run)


class Fleet(Protocol):
    """Tables, wherever they are played, and all that ever decoded for them."""

    tables: Sequence[ServedTable]
    engines: Sequence[Engine]

    @property
    def is_alive(self) -> bool:
        """Whether anything can be played."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Play; the players' connections belong to the loop."""

    async def close(self) -> None:
        """End after the frames that are decoded now."""

    def check(self) -> None:
        """Go on; DiagdError: nothing can be played any more."""
        return

    def metrics(self) -> Sequence[tuple[str, str, str, float]]:
        """Name, kind, meaning and value of further figures."""
        return ()


class LocalFleet(Fleet):
    """Tables of this process, over one engine."""

    tables: Sequence[Table]

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tuple(tables)
        self.engine = GameLoop([table.stage for table in self.tables])
        self.engines = [self.engine]
        for table in self.tables:
            table.engine = self.engine

    @override
    @property
    def is_alive(self) -> bool:
        return self.engine.is_alive()

    @override
    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        for table in self.tables:
            table.open(loop)
        self.engine.start()

    @override
    async def close(self) -> None:
        await asyncio.to_thread(self.engine.close)
        for table in self.tables:
            if table.keep is not None and table.ticket:
                table.keep(table.game.snapshot())
