"""A small world that nobody trained, and games over it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from diagd.export.exporter import export, random_sources
from diagd.export.families.cosmos import CosmosDvConfig
from diagd.export.options import GraphOptions
from diagd.play.controls import Inputs, read_controls
from diagd.play.game import Game
from diagd.play.opening import GameOptions, open_game, open_games
from diagd.play.server import Address, Limits, Server
from diagd.play.service import SavedGames, keep_worlds
from diagd.play.table import LocalFleet, Table
from diagd.schedule import StreamLayout
from tests.models import small_family
from tests.oracles.models import small_model

LOOSE = Limits(messages_per_second=1e6, hello_seconds=60)
"""For tests that say much in little time, on machines that are slow at times."""


@pytest.fixture(scope="session")
def temporal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without actions whose tokenizer compresses time eightfold."""
    sizes = CosmosDvConfig(
        height=16, width=32, stem_channels=4, channels=(4, 8), res_blocks=1, latent_channels=4
    )
    family = replace(small_family(small_model(StreamLayout(2, 4), layers=1)), tokenizer=sizes)
    path = tmp_path_factory.mktemp("temporal") / "temporal.diagd"
    return export(family, GraphOptions(), random_sources(family, 0), path).path


@pytest.fixture
def game(world: Path) -> Iterator[Game]:
    game = open_game(world, GameOptions())
    game.reset(game.prompts[0])
    yield game
    game.close()


Serve = Callable[..., AbstractContextManager[tuple[str, Server]]]


@pytest.fixture
def serve(world: Path) -> Serve:
    """Serve the world in a thread of its own; gives the address of the page, and the server."""

    @contextmanager
    def serving(
        options: GameOptions | None = None,
        limits: Limits = LOOSE,
        rate: float = 60.0,
        bundle: Path = world,
        sessions: int = 1,
        kept: float | None = None,
        state: Path | None = None,
        address: Address | None = None,
    ) -> Iterator[tuple[str, Server]]:
        group, games = open_games(bundle, options or GameOptions(), sessions)
        codec = games[0].bundle.manifest.actions
        tables = [Table(game, Inputs(read_controls(bundle, codec), codec), rate, every=4) for game in games]
        address = address or Address(port=0)
        if state is not None:
            saves = SavedGames(state, games[0].bundle.digest)
            address = keep_worlds(saves, tables, address)
        server = Server(LocalFleet(tables), address, limits, kept)
        try:
            with running(server) as url:
                yield url, server
        finally:
            if state is not None:
                saves.close()
            if sessions > 1:
                group.close()

    return serving


def table_of(server: Server, number: int = 0) -> Table:
    """A table whose world is played in this process."""
    table = server.tables[number]
    assert isinstance(table, Table)
    return table


@contextmanager
def running(server: Server) -> Iterator[str]:
    """A server in a thread of its own; gives the address of its page."""
    urls: list[str] = []
    ready, loop = threading.Event(), asyncio.new_event_loop()

    def started(url: str) -> None:
        urls.append(url)
        ready.set()

    def run() -> None:
        with loop_of(loop):
            loop.run_until_complete(task)

    task = loop.create_task(server.run(started))
    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(120)
    try:
        yield urls[0]
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(task.cancel)
        thread.join(120)


@contextmanager
def loop_of(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    asyncio.set_event_loop(loop)
    try:
        yield
    except asyncio.CancelledError:
        pass
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
