"""Worlds for many players at once, behind one address, and the folder they are kept in."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final, Literal

from pydantic import BaseModel, Field, ValidationError

from diagd.bundle import Bundle
from diagd.bundle.files import atomic_file
from diagd.bundle.lock import turn
from diagd.bundle.targets import folder_target
from diagd.errors import UsageError
from diagd.options import File, checked, flag, setting
from diagd.play.controls import Inputs, read_controls
from diagd.play.game import SavedGame
from diagd.play.opening import GameOptions, open_games
from diagd.play.server import Address, Limits, Server
from diagd.play.table import EVERY, Fleet, ServedTable, Table

_LOG = logging.getLogger(__name__)

MARK: Final = "token"
KIND: Final = "diagd worlds"


@checked
class Service:
    """How worlds are served; those of ``sessions`` share the passes of one engine."""

    sessions: int = flag("of play: worlds at once (default 4)", 4, ge=1, le=256)
    fps: float | None = flag("of play: frames a second of each (default: the model's)", None, ge=0.1, le=240)
    state: File | None = setting("of play: folder of worlds that a server after this one goes on with", None)
    every: int = setting("of play: frames between two snapshots of a world", EVERY, ge=1)
    limits: Limits = Limits()


def serve(
    bundle: Bundle, fleet: Fleet, service: Service, address: Address, started: Callable[[str, str], None]
) -> None:
    """Serve worlds of a bundle until interrupted, and, when it is asked to end, until the players have gone.

    ``started`` is given the model's name and the address of the page once it is served.

    Raises:
        DiagdError: nobody can listen there, or worlds cannot be kept or played any more.
    """
    with ExitStack() as held:
        if service.state is not None:
            held.enter_context(turn(saved_games_target(service.state)))  # a server there ends first
            saves = held.enter_context(closing(SavedGames(service.state, bundle.digest)))
            address = keep_worlds(saves, fleet.tables, address)
        rate = service.fps or bundle.manifest.frames_per_second
        server = Server(fleet, address, service.limits, rate)

        async def run() -> None:
            listen(server)
            await server.run(lambda url: started(bundle.manifest.name, url))

        with _told_by_signals() as listen, suppress(KeyboardInterrupt):
            asyncio.run(run())


@contextmanager
def opened_tables(path: Path, options: GameOptions, service: Service) -> Iterator[list[Table]]:
    """A table for each world, over one engine; DiagdError: the bundle cannot be played, or not by so many."""
    group, games = open_games(path, options, service.sessions)
    manifest = games[0].bundle.manifest
    rate = service.fps or manifest.frames_per_second
    tables = []
    for game in games:
        inputs = Inputs(read_controls(game.bundle.path, manifest.actions), manifest.actions)
        tables.append(Table(game, inputs, rate, paced=False, every=service.every))
    try:
        yield tables
    finally:
        group.close()


def keep_worlds(saves: SavedGames, tables: Sequence[ServedTable], address: Address) -> Address:
    """Go on with the worlds that a server before kept, at its address, and keep those that are played now."""
    for number, ticket, snapshot in saves.find(len(tables)):
        tables[number].take_up(SavedGame(snapshot), ticket)
    for number, table in enumerate(tables):
        table.keep = partial(_keep, saves, number, table)
    return replace(address, token=saves.token)


def _keep(saves: SavedGames, number: int, table: ServedTable, snapshot: bytes | None) -> None:
    if snapshot is None:
        saves.drop(number)
    elif table.ticket:
        saves.put(number, table.ticket, snapshot)


@contextmanager
def _told_by_signals() -> Iterator[Callable[[Server], None]]:
    """Gives what has signals end a server of the running loop; those that are ignored, as by nohup, stay so.

    They raise nothing meanwhile: a second Ctrl-C would hit it amid what it does to end.
    """
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGTERM") if hasattr(signal, name)]
    before = {number: was for number in numbers if (was := signal.getsignal(number)) is not signal.SIG_IGN}

    def listen(server: Server) -> None:
        loop = asyncio.get_running_loop()

        def tell(number: int, _: FrameType | None) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(server.drain if number == signal.SIGTERM else server.end)

        for number in before:
            signal.signal(number, tell)

    try:
        yield listen
    finally:
        for number, was in before.items():
            signal.signal(number, was)


class _Marked(BaseModel):
    """What the file `MARK` of a folder of worlds holds."""

    kind: Literal["diagd worlds"]
    token: str = Field(pattern="^[A-Za-z0-9_-]{16,128}$")


class _Head(BaseModel):
    """First line of a world that is kept."""

    bundle: str
    ticket: str = Field(min_length=1, max_length=128)


def saved_games_target(folder: Path) -> Path:
    """Where worlds can be kept; UsageError: the folder holds something else, or cannot be written."""
    return folder_target(folder, {MARK: KIND.encode()}, "worlds that diagd serve keeps", "--set state")


class SavedGames:
    """A folder of kept games, which another server finds when this one died: each with its player's ticket.

    It is made where it is not there, for this user's eyes, as tickets and token let somebody in; ``token`` is
    that of the server before, so that the address of its page still holds. Worlds of other bundles than the
    one with the digest ``bundle`` stay as they are.

    Raises:
        UsageError: the folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, bundle: str) -> None:
        self._folder, self._bundle, self._writer = folder, bundle, ThreadPoolExecutor(1)
        saved_games_target(folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.token = self._token(folder / MARK)
        except OSError as error:
            raise UsageError(f"{folder} cannot hold worlds: {error.strerror or error}") from None

    def _token(self, path: Path) -> str:
        if path.exists():
            try:
                return _Marked.model_validate_json(path.read_bytes()).token
            except ValidationError:
                raise UsageError(
                    f"{path} is damaged; remove it, and the server gets another address"
                ) from None
        made = _Marked(kind=KIND, token=secrets.token_urlsafe(16))
        self._write(path, made.model_dump_json().encode())
        return made.token

    def put(self, number: int, ticket: str, snapshot: bytes) -> None:
        """Keep the world of a table; the disk is written in a thread of its own."""
        head = _Head(bundle=self._bundle, ticket=ticket).model_dump_json().encode()
        self._writer.submit(self._put, self._path(number), head + b"\n" + snapshot)

    def drop(self, number: int) -> None:
        """The world of a table is nobody's."""
        self._writer.submit(self._path(number).unlink, missing_ok=True)

    def close(self) -> None:
        """Write what is to be written."""
        self._writer.shutdown()

    def _put(self, path: Path, content: bytes) -> None:
        try:
            self._write(path, content)
        except OSError as error:  # the games go on
            _LOG.warning("a world is not kept: %s: %s", path, error.strerror or error)

    def find(self, tables: int) -> Iterator[tuple[int, str, bytes]]:
        """Number, ticket and snapshot of each world of this bundle that is kept."""
        for number in range(tables):
            path = self._path(number)
            try:
                head, _, snapshot = path.read_bytes().partition(b"\n")
                told = _Head.model_validate_json(head)
            except FileNotFoundError:
                continue
            except (OSError, ValidationError):
                _LOG.warning("%s is damaged: the world is not gone on with", path)
                continue
            if told.bundle == self._bundle:
                yield number, told.ticket, snapshot

    def _path(self, number: int) -> Path:
        return self._folder / f"world-{self._bundle[:12]}-{number}"

    def _write(self, path: Path, content: bytes) -> None:
        with atomic_file(path) as partial, partial.open("wb") as file:
            partial.chmod(0o600)
            file.write(content)
