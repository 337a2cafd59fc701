"""Worlds for many players at once, behind one address."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from diagd.bundle import Bundle
from diagd.bundle.files import turn
from diagd.play.controls import Inputs, read_controls
from diagd.play.fleet import Fleet, LocalFleet
from diagd.play.opening import GameOptions, open_games
from diagd.play.saved import EVERY, SavedGame, SavedGames, saved_games_target
from diagd.play.server import Address, Limits, Server
from diagd.play.table import ServedTable, Table


@dataclass(frozen=True)
class Service:
    """How worlds are served.

    ``sessions`` worlds share the passes of one engine, each at a ``rate`` in frames a second, None being the
    model's. Every so many frames they are saved in the folder ``state`` for a server after this one; None:
    they end with it.
    """

    sessions: int
    rate: float | None
    limits: Limits
    state: Path | None = None
    every: int = EVERY


def serve(
    path: Path, options: GameOptions, service: Service, address: Address, started: Callable[[str, str], None]
) -> None:
    """Serve until it is interrupted, and, when it is asked to end, until the players have gone.

    ``started`` is given the model's name and the address of the page once it is served.

    Raises:
        DiagdError: the bundle cannot be played, or not by so many, or nobody can listen there.
    """
    with opened_tables(path, options, service) as tables:
        serve_fleet(tables[0].game.bundle, LocalFleet(tables), service, address, started)


def serve_fleet(
    bundle: Bundle, fleet: Fleet, service: Service, address: Address, started: Callable[[str, str], None]
) -> None:
    """Likewise, worlds of a bundle wherever they are played."""
    with ExitStack() as held:
        if service.state is not None:
            held.enter_context(turn(saved_games_target(service.state)))  # a server there ends first
            saves = held.enter_context(closing(SavedGames(service.state, bundle.digest)))
            address = keep_worlds(saves, fleet.tables, address)
        rate = service.rate or bundle.manifest.frames_per_second
        server = Server(fleet, address, service.limits, rate)
        with suppress(KeyboardInterrupt):
            asyncio.run(_until_drained(server, lambda url: started(bundle.manifest.name, url)))


@contextmanager
def opened_tables(path: Path, options: GameOptions, service: Service) -> Iterator[list[Table]]:
    """A table for each world, over one engine.

    Raises:
        DiagdError: as `serve`.
    """
    group, games = open_games(path, options, service.sessions)
    manifest = games[0].bundle.manifest
    rate = service.rate or manifest.frames_per_second
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


async def _until_drained(server: Server, started: Callable[[str], None]) -> None:
    with suppress(NotImplementedError):  # Windows has no such handlers
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.drain)
    await server.run(started)
