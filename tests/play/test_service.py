"""Worlds for many players: seats, limits, figures, and the way out."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from importlib.metadata import version

import numpy as np
import pytest
from packaging.version import Version
from websockets.exceptions import ConnectionClosed

from diagd.play.room import SETTLED
from diagd.play.server import Limits, Server
from diagd.play.stage import MAX_COMMANDS
from tests.play.conftest import LOOSE, Serve, table_of
from tests.play.test_server import player


def told(url: str, path: str) -> tuple[int, str]:
    """Status and text of what a server tells."""
    try:
        with urllib.request.urlopen(url.partition("/#")[0] + path, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def measured(server: Server) -> int:
    """Passes of the first world's engine, of those that its figures are of."""
    engine = server.tables[0].engine
    assert engine is not None
    return engine.figures.measured


def answered(url: str, asked: str) -> str:
    """Status of a request without headers, as load balancers send it."""
    host, port = url.removeprefix("http://").partition("/#")[0].split(":")
    with socket.create_connection((host, int(port)), timeout=120) as plain:
        plain.sendall(f"{asked}\r\n\r\n".encode())
        return plain.makefile().readline().split()[1]


def test_players_have_worlds_of_their_own_in_the_same_passes(serve: Serve) -> None:
    with serve(sessions=2) as (url, server), player(url) as ann, player(url) as ben:
        ann.say(type="input", t=1.0, keys=["ArrowLeft"])
        for _ in range(5):
            ann.frame()
            ben.frame()
        games = [table_of(server, number).game for number in range(2)]
        assert games[0].session.engine is games[1].session.engine
        ann.say(type="pace", mode="pause")  # else a newer frame may be shown in the place of that one
        ann.say(type="rewind", frames=10_000)
        ann.until(kind="frame", known=1)
        ann.say(type="pace", mode="live")
        assert ben.frame()["known"] > 5
        assert ann.frame()["known"] > 1
        with player(url) as cid:
            assert cid.until(type="waiting")["place"] == 1
            assert told(url, "/ready")[0] == 503
            assert told(url, "/health")[0] == 200
            assert told(url, "/health?from=probe")[0] == 200
            if Version(version("websockets")) >= Version("17"):  # no Host; others know GET of HTTP/1.1 alone
                for asked in ("OPTIONS / HTTP/1.0", "GET /health HTTP/1.0", "HEAD /health HTTP/1.1"):
                    assert answered(url, asked) == "200", asked
                answers = [answered(url, f"GET {path} HTTP/1.0") for path in ("/ready", "/socket")]
                assert answers == ["503", "403"]
            status, figures = told(url, "/metrics")
        assert status == 200
        values = dict(line.split() for line in figures.splitlines() if not line.startswith("#"))
        assert (values["diagd_seats"], values["diagd_players"]) == ("2", "2")
        assert values["diagd_waiting"] == "1"
        assert int(values["diagd_frames_total"]) > 10
        assert float(values["diagd_frame_p95_seconds"]) > 0
        assert figures.endswith("# EOF\n")


def test_a_game_ends_and_the_next_in_turn_plays(serve: Serve) -> None:
    limits = Limits(messages_per_second=1e6, hello_seconds=60, game=30.0)
    with serve(limits=limits) as (url, server), player(url) as ann, player(url) as ben:
        assert ben.until(type="waiting")["place"] == 1
        own = ann.until(type="state")
        ann.say(type="choose", settings={**own["settings"], "seed": 7, "decoder": "k=1 serial"})
        ann.say(type="pace", mode="pause")
        ann.until(type="state", mode="pause")
        warned = ann.until(type="ends")
        assert 0 < warned["seconds"] <= limits.game
        assert "as long as games are here" in warned["why"]
        server.tables[0].taken -= limits.game
        with pytest.raises(ConnectionClosed) as ended:
            ann.until(type="never")
        assert ended.value.rcvd is not None
        assert ended.value.rcvd.code == 4008
        ben.until(type="welcome")
        begun = ben.until(type="state")
        assert all(begun[name] == own[name] for name in ("settings", "mode", "rate"))
        ben.frame()


def test_who_presses_nothing_gives_up_the_seat(serve: Serve) -> None:
    with serve(sessions=2) as (url, server), player(url) as ann, player(url) as ben:
        ann.frame()
        ben.frame()
        first, second = server.tables
        first.heard = second.heard = long_ago = time.monotonic() - LOOSE.idle + 30
        while second.heard == long_ago:
            ben.say(type="input", t=1.0, keys=["ArrowLeft"])
            ben.frame()
        first.heard -= 30
        with pytest.raises(ConnectionClosed):
            for _ in range(10_000):
                ann.say(type="input", t=1.0, keys=[])
                ann.hear()
        ben.frame()


def test_nobody_is_seated_who_would_take_the_rate_from_others(serve: Serve) -> None:
    with serve(sessions=2, kept=1e5) as (url, server), player(url) as ann:
        while measured(server) < SETTLED:
            ann.frame()
        with player(url) as ben:
            assert ben.until(type="waiting")["place"] == 1
            assert server.tables[1].player is None
            assert "diagd_refusals_total 0" not in told(url, "/metrics")[1]
            ann.frame()


def test_a_seat_that_is_held_for_somebody_who_left_keeps_nobody_from_another(serve: Serve) -> None:
    with serve(sessions=2, kept=1e5) as (url, server):
        with player(url) as ann:
            ann.frame()
        with player(url) as ben:
            ben.frame()
        assert all(table.ticket for table in server.tables)


def test_who_came_last_waits_again_where_the_rate_is_lost(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diagd.play.room.TRIAL_SECONDS", 3600.0)
    with serve(sessions=2, kept=0.5) as (url, server), player(url) as ann:
        while measured(server) < SETTLED:
            ann.frame()
        with player(url) as ben:
            ben.frame()
            server.room.rate = 1e5
            while server.tables[1].player is not None:
                ann.frame()
            assert ben.until(type="waiting")["place"] == 1
            assert "diagd_put_back_total 1" in told(url, "/metrics")[1]
            server.room.rate = 0.5  # that could be kept
            for _ in range(2 * SETTLED):
                ann.frame()
            assert server.tables[1].player is None


def test_who_chose_settings_last_waits_again_where_the_rate_is_lost(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diagd.play.room.TRIAL_SECONDS", 3600.0)
    with serve(sessions=2, kept=0.5) as (url, server), player(url) as ann:
        while measured(server) < SETTLED:
            ann.frame()
        with player(url) as ben:
            ben.frame()
            own = table_of(server).game.settings.model_dump(mode="json")
            ann.say(type="choose", settings={**own, "seed": 3})
            assert ann.until(type="state")["settings"]["seed"] == 3
            server.room.rate = 1e5
            assert ann.until(type="waiting")["place"] == 1
            ben.frame()


def test_what_takes_long_is_done_for_one_player_once_in_a_while(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diagd.play.table.REST", 1e6)
    with serve(sessions=2) as (url, server), player(url) as ann:
        table_of(server)._paced = False
        for _ in range(3):
            ann.frame()
        for _ in range(2):
            ann.say(type="audit")
        assert ann.until(type="audit")["frames"] > 0
        assert "ask again in" in ann.until(type="error")["text"]
        ann.frame()


def test_who_is_next_gets_nothing_of_the_world_before_whatever_waits_at_its_table(serve: Serve) -> None:
    with serve() as (url, server), player(url) as ann:
        table, busy = table_of(server), threading.Event()
        own = ann.until(type="state")
        ann.say(type="choose", settings={**own["settings"], "seed": 7})
        ann.until(type="state")
        table.stage.post(partial(busy.wait, 60))
        ann.say(type="save")
        for _ in range(MAX_COMMANDS):
            ann.say(type="branch")
        assert "commands wait already" in ann.until(type="error")["text"]
        server.room.clear(table)
        with player(url) as ben:
            assert ben.until(type="welcome")["ticket"] == table.ticket
            busy.set()
            while (message := ben.hear()).get("type") != "state":
                assert message.get("kind") in ("gallery", "frame"), message
            assert message["settings"] == own["settings"]
            assert (message["known"], len(message["marks"])) == (1, 1)


def test_a_server_that_drains_ends_with_its_last_player(serve: Serve) -> None:
    with serve(sessions=2, limits=LOOSE) as (url, server), player(url) as ann:
        ann.frame()
        server.drain()
        assert ann.until(type="ends")["why"] == "the server is being closed"
        ends = server._drains
        server.drain()
        assert server._drains == ends
        assert told(url, "/ready")[0] == 503
        with player(url) as ben:
            assert ben.until(type="waiting")["place"] == 1
        ann.socket.close()
        end = time.monotonic() + 120
        while server.fleet.is_alive and time.monotonic() < end:
            time.sleep(0.1)
        assert not server.fleet.is_alive


def test_one_world_that_fails_leaves_the_others_playing(serve: Serve) -> None:
    with serve(sessions=2) as (url, server), player(url) as ann, player(url) as ben:
        ann.frame()
        game = table_of(server).game
        game._past.clear()
        game.view.show = None  # type: ignore[assignment]
        assert "internal error" in ann.until(type="error")["text"]
        for _ in range(5):
            ben.frame()
        assert np.isfinite(table_of(server, 1).stage.pacer.fps)
