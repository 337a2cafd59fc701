"""Worlds on a cluster go on to the token, whatever is killed under them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from diagd.bundle import Bundle
from diagd.cluster.fleet import PlayActor, RayFleet
from diagd.cluster.workers import EngineOptions
from diagd.errors import EngineError
from diagd.play.opening import GameOptions, open_game
from diagd.play.record import Ahead, Line, Played, Start, replay
from diagd.play.server import Address, Server
from diagd.play.service import SavedGames, Service, keep_worlds
from tests.cluster.pool_work import Absent
from tests.play.conftest import LOOSE, running
from tests.play.test_server import Player, player
from tests.play.test_service import told

pytestmark = pytest.mark.slow


@contextmanager
def served(
    world: Path, nodes: Any, every: int = 5, state: Path | None = None, cores: int = 1
) -> Iterator[tuple[str, RayFleet]]:
    """Two engines, which may have to be started yet."""
    service = Service(sessions=1, fps=20.0, limits=LOOSE, every=every)
    where = EngineOptions(cluster=nodes.address, engines=2, cores=cores)
    fleet = RayFleet(bundle := Bundle.open(world), GameOptions(), service, where)
    with ExitStack() as held:
        address = Address(port=0)
        if state is not None:
            saves = held.enter_context(closing(SavedGames(state, bundle.digest)))
            address = keep_worlds(saves, fleet.tables, address)
        yield held.enter_context(running(Server(fleet, address, LOOSE))), fleet


def wait_for_both(fleet: RayFleet) -> None:
    end = time.monotonic() + 300
    while not all(engine.is_alive for engine in fleet.engines) and time.monotonic() < end:
        time.sleep(0.1)
    assert len({engine.node for engine in fleet.engines}) == 2


def until(ann: Player, **wanted: Any) -> dict[str, Any]:
    """The next message that has all that is wanted; an engine may have to be started for it."""
    while True:
        message = ann.hear(200)
        if all(message.get(name) == value for name, value in wanted.items()):
            return message


def plays(ann: Player, key: str, frames: int) -> int:
    """So many frames under a key; the number of the last."""
    message: dict[str, Any] = {}
    for _ in range(frames):
        while "ms" not in (message := ann.hold(1.0, key)):
            pass
    known: int = message["known"]
    return known


def test_another_server_goes_on_with_worlds_as_they_were_when_the_one_before_ended(
    nodes: Any, world: Path, tmp_path: Path
) -> None:
    with served(world, nodes, every=1 << 30, state=tmp_path / "state") as (url, fleet):
        wait_for_both(fleet)
        with player(url) as ann:
            ticket = ann.until(type="welcome")["ticket"]
            known = plays(ann, "ArrowLeft", 9)
    with served(world, nodes, state=tmp_path / "state") as (url, _), player(url, ticket) as ann:
        assert until(ann, kind="frame")["known"] >= known  # the world, and no other before it


def test_two_servers_share_a_cluster_as_far_as_it_goes(
    nodes: Any, world: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diagd.cluster.fleet._SLOW", 2.0)
    with ExitStack() as first, ExitStack() as second:
        one, fleet = first.enter_context(served(world, nodes))
        wait_for_both(fleet)
        caplog.clear()
        two, other = second.enter_context(served(world, nodes, cores=2))
        with player(one) as ann, player(two) as ben:
            assert until(ben, type="waiting")["place"] == 1
            while "waits until a node has cores" not in caplog.text:
                plays(ann, "ArrowUp", 3)
            assert told(two, "/health")[0] == 503
            first.close()
            until(ben, type="welcome")
            wait_for_both(other)
            plays(ben, "ArrowUp", 3)


def test_a_node_that_lacks_what_plays_is_told(nodes: Any, world: Path) -> None:
    import ray

    fleet = RayFleet(Bundle.open(world), GameOptions(), Service(), EngineOptions(cluster=nodes.address))
    fleet.start_actor = lambda node: ray.remote(PlayActor).remote(world, GameOptions(), Absent())
    with pytest.raises(EngineError, match=r"No module named 'absent'.*each needs the same Python"):
        asyncio.run(asyncio.wait_for(fleet.engines[0].run(), 300))


def test_an_engine_waits_for_a_node_where_all_are_gone(nodes: Any, world: Path) -> None:
    fleet = RayFleet(Bundle.open(world), GameOptions(), Service(), EngineOptions(cluster=nodes.address))
    there = fleet._nodes()
    seen = iter([[], [{**there[0], "Alive": False}], there])
    fleet._nodes = lambda: next(seen)
    place = asyncio.run(fleet.free_node(fleet.engines[0]))
    assert place in {node["NodeID"] for node in there}


def test_a_world_of_which_only_the_beginning_is_kept_goes_on_to_the_token(
    nodes: Any, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that had begun when its engine was killed, or stopped for good, are part of how it went."""
    import ray

    monkeypatch.setattr("diagd.cluster.fleet._SILENT", 10.0)
    ends = iter((signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL))
    with served(world, nodes, every=1 << 30) as (url, fleet):
        wait_for_both(fleet)
        with player(url) as ann:
            settings = until(ann, type="state")["settings"]
            ann.say(type="choose", settings=settings | {"decoder": "k=1 chained"})
            for key, frames in (("ArrowLeft", 2), ("ArrowUp", 5), ("ArrowDown", 9)):
                known = plays(ann, key, frames)
                actor = fleet.tables[0].home.actor
                os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), next(ends))
                assert "goes on elsewhere" in until(ann, type="error")["text"]
                assert until(ann, kind="frame")["known"] >= known
            plays(ann, "ArrowRight", 3)
            ann.say(type="pace", mode="pause")
            until(ann, type="state", mode="pause")
            saved = fleet.tables[0].saved
            saved.stop()
            snapshot, lines = saved.snapshot, list(saved.lines)
    assert [len(line.ahead) for line in lines if isinstance(line, Ahead)] == [2, 2, 2, 2]
    assert snapshot is not None
    with open_game(world, GameOptions()) as game:
        game.restore(snapshot)
        assert game.known == 1
        shown = list(replay(game, list(enumerate(lines, start=1))))
    assert [one.frame.index for one in shown] == list(range(1, len(shown) + 1))


def test_an_engine_that_cannot_be_started_anew_ends_nobody_elses_game(
    nodes: Any, world: Path, tmp_path: Path
) -> None:
    import ray

    bundle = shutil.copytree(world, tmp_path / "world.diagd")
    with served(bundle, nodes) as (url, fleet), player(url) as ann:
        ann.until(type="welcome")
        wait_for_both(fleet)
        known = plays(ann, "ArrowLeft", 3)
        other = next(engine for engine in fleet.engines if engine is not fleet.tables[0].engine)
        bundle.rename(tmp_path / "away")
        actor = other.actor
        ray.kill(actor)
        while other.actor is actor or other.is_alive:
            assert plays(ann, "ArrowUp", 3) > known
        plays(ann, "ArrowUp", 40)  # it was tried in vain
        assert not other.is_alive
        (tmp_path / "away").rename(bundle)
        wait_for_both(fleet)
        plays(ann, "ArrowUp", 3)


def test_a_world_outlives_its_actor_and_its_node(nodes: Any, world: Path) -> None:
    import ray

    lines: list[Line] = []
    with ExitStack() as held:
        url, fleet = held.enter_context(served(world, nodes))
        wait_for_both(fleet)
        table = fleet.tables[0]
        hear, add = table.hear, lines.append

        def listen(kind: str, value: Any) -> None:
            if kind == "lines":
                add(value[0])
            hear(kind, value)

        table.hear = listen  # type: ignore[method-assign]
        ann = held.enter_context(player(url))
        ticket = ann.until(type="welcome")["ticket"]
        ann.say(type="pace", mode="step")
        known = plays(ann, "ArrowLeft", 13)
        worker = next(node for node in nodes.list_all_nodes() if node is not nodes.head_node)
        for key in ("ArrowUp", "ArrowDown"):
            engine = table.home
            if engine.node == worker.node_id:
                nodes.remove_node(worker, allow_graceful=False)
            else:
                ray.kill(engine.actor)
            assert "goes on elsewhere" in until(ann, type="error")["text"]
            assert until(ann, type="welcome")["ticket"] == ticket
            assert until(ann, type="state")["mode"] == "step"
            later = plays(ann, key, 9)
            assert later > known
            known = later
        status, figures = told(url, "/metrics")
        assert status == 200
        assert "diagd_moves_total 0" not in figures
        values = dict(line.split() for line in figures.splitlines() if not line.startswith("#"))
        played = sum(isinstance(line, Played) for line in lines)
        assert int(values["diagd_frames_total"]) >= played - 2  # which may come ahead of being counted
    # alone, on one engine that nobody killed: every frame has the tokens that the player saw
    assert isinstance(lines[0], Start)
    assert sum(isinstance(line, Played) for line in lines) > 30
    with open_game(world, GameOptions()) as game:
        shown = list(replay(game, list(enumerate(lines, start=1))))
    assert [one.frame.index for one in shown] == list(range(1, len(shown) + 1))
