"""Worlds for many players at once, behind one address."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diagd.play.controls import Inputs, read_controls
from diagd.play.opening import GameOptions, open_games
from diagd.play.server import Address, Limits, Server
from diagd.play.table import Table


@dataclass(frozen=True)
class Service:
    """How worlds are served.

    Attributes:
        sessions: worlds at once, in the passes of one engine.
        rate: frames a second that every player is to get; None: the model's.
        limits: of connections and seats.
    """

    sessions: int
    rate: float | None
    limits: Limits


def serve(
    path: Path, options: GameOptions, service: Service, address: Address, started: Callable[[str, str], None]
) -> None:
    """Serve until it is interrupted, and, when it is asked to end, until the players have gone.

    Args:
        path: bundle that is played.
        options: what it runs on.
        service: for how many, and how fast.
        address: where.
        started: is given the model's name and the address of the page once it is served.

    Raises:
        DiagdError: the bundle cannot be played, or not by so many, or nobody can listen there.
    """
    group, games = open_games(path, options, service.sessions)
    manifest = games[0].bundle.manifest
    rate = service.rate or manifest.frames_per_second
    tables = []
    for game in games:
        inputs = Inputs(read_controls(game.bundle.path, manifest.actions), manifest.actions)
        tables.append(Table(game, inputs, rate, paced=False))
    server = Server(tables, address, service.limits, rate)
    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(_until_drained(server, lambda url: started(manifest.name, url)))
    finally:
        group.close()


async def _until_drained(server: Server, started: Callable[[str], None]) -> None:
    with suppress(NotImplementedError):  # Windows has no such handlers
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.drain)
    await server.run(started)
