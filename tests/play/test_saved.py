"""A game goes on elsewhere to the token: from a snapshot, and what of its record came since."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle.lock import turn
from diagd.errors import QualityError, UsageError
from diagd.play.game import Game, SavedGame
from diagd.play.opening import GameOptions, open_game
from diagd.play.record import Played
from diagd.play.server import Server
from diagd.play.service import SavedGames
from tests.play.conftest import LOOSE, Serve, table_of
from tests.play.test_game import ORDERS, WALK, equal, play, with_order
from tests.play.test_server import parts, player

AGAIN = """
import os, signal, sys
from diagd.cli.main import main
from diagd.play.table import LocalFleet
close = LocalFleet.close
async def interrupted(self):
    os.kill(os.getpid(), signal.SIGINT)
    await close(self)
    print("closed")
LocalFleet.close = interrupted
sys.exit(main(sys.argv[1:]))
"""
"""diagd where Ctrl-C comes while worlds are closed."""


@contextmanager
def elsewhere(game: Game) -> Iterator[Game]:
    with open_game(game.bundle.path, GameOptions()) as other:
        yield other


@pytest.mark.parametrize("order", ORDERS[:3])
def test_a_game_goes_on_from_a_snapshot(game: Game, order: str) -> None:
    with_order(game, order, seed=3)
    play(game, *WALK[:4])
    mark = game.branch()
    play(game, *WALK[4:6])
    snapshot = game.snapshot()
    with elsewhere(game) as other:
        other.restore(snapshot)
        rest = play(game, *WALK[6:])
        assert equal(play(other, *WALK[6:]), rest)
        assert np.array_equal(other.look(), game.look())
        other.rewind(len(rest))
        game.rewind(len(rest))
        assert equal(play(other, *WALK[6:]), play(game, *WALK[6:]))
        assert np.array_equal(other.visit(mark), game.visit(mark))
        assert equal(play(other, "right", "down"), play(game, "right", "down"))
        assert (other.here, other.known) == (game.here, game.known)
    with pytest.raises(UsageError, match="no snapshot of a game"):
        game.restore(snapshot[:-100])


@pytest.mark.parametrize("order", ORDERS[:3])
def test_what_came_since_is_played_again(game: Game, order: str) -> None:
    kept = SavedGame()
    game.record.heard = kept.add
    with_order(game, order)
    play(game, *WALK[:3])
    game.reset(game.prompts[0])
    play(game, *WALK[:3])
    with elsewhere(game) as other:  # without a snapshot, from the start
        kept.restore(other)
        game.stop()  # an order that overlaps frames begins anew there, and so it does here
        assert equal(play(other, "up"), play(game, "up"))
    kept.take(game.snapshot())
    assert not kept.lines
    play(game, *WALK[4:8])
    mark = game.branch()
    game.rewind(2)
    with_order(game, order, seed=5)
    play(game, "left", "left")
    game.visit(mark)
    play(game, "up")
    with elsewhere(game) as other:
        kept.restore(other)
        game.stop()
        assert equal(play(other, *WALK), play(game, *WALK))
    wrong = next(line for line in kept.lines if isinstance(line, Played))
    kept.lines[kept.lines.index(wrong)] = wrong.model_copy(update={"tokens": "00000000"})
    with elsewhere(game) as other, pytest.raises(QualityError, match="first that differs"):
        kept.restore(other)


def test_rows_that_a_comparison_had_built_again_are_built_again_elsewhere(game: Game) -> None:
    """They round otherwise, which int8 makes other tokens of."""
    kept = SavedGame()
    game.record.heard = kept.add
    game.reset(game.prompts[0])
    play(game, *WALK[:6])
    game.audit(4)
    with elsewhere(game) as other:
        kept.restore(other)
        built = [one.session.timing.refill_steps for one in (game, other)]
        assert equal(play(other, "up"), play(game, "up"))
        after = [one.session.timing.refill_steps for one in (game, other)]
    assert after[0] - built[0] == after[1] - built[1] > 0


@pytest.mark.parametrize("order", ORDERS[:3])
def test_a_game_goes_on_elsewhere_twice(game: Game, order: str) -> None:
    kept = SavedGame()
    game.record.heard = kept.add
    game.reset(game.prompts[0])
    with_order(game, order, seed=3)
    play(game, *WALK[:3])
    with elsewhere(game) as other, elsewhere(game) as third:
        kept.restore(other)
        other.record.heard = kept.add
        play(other, *WALK[3:6])
        kept.restore(third)
        other.stop()
        assert equal(play(third, *WALK[6:]), play(other, *WALK[6:]))


def written(server: Server) -> None:
    """Wait until the disk has what was to be kept of the first world so far."""
    keep = server.tables[0].keep
    assert isinstance(keep, partial)
    keep.args[0]._writer.submit(int).result()


def test_another_server_goes_on_with_the_worlds_of_one_that_died(serve: Serve, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serve(sessions=2, limits=LOOSE, state=state) as (url, server), player(url) as ann:
        ticket = ann.until(type="welcome")["ticket"]
        ann.say(type="reset", prompt=2)
        while ann.frame()["known"] < 9 or not (kept := list(state.glob("world-*-0"))):
            pass
        for number in range(2):
            table_of(server, number)._every = 1 << 30  # it is kept once more as the server ends
        for _ in range(5):
            last = ann.frame()["known"]
        token, seed = parts(url)[1], table_of(server).game.settings
    with serve(sessions=2, limits=LOOSE, state=state) as (url, server):
        assert parts(url)[1] == token
        with player(url) as cid:  # a newcomer has the other seat
            assert cid.until(type="welcome")["ticket"] != ticket
        with player(url, ticket) as ann:
            assert ann.until(type="state")["settings"] == seed.model_dump(mode="json")
            assert ann.frame()["known"] > max(last, 5)
            ann.say(type="pace", mode="pause")  # else a newer frame may be shown in the place of that one
            ann.say(type="reset")
            ann.until(kind="frame", known=1)
            game = table_of(server).game
            assert np.array_equal(game.marks[0].past[0].tokens, game.prompts[2][0])
        server.room.clear(server.tables[0])
        written(server)
        assert not kept[0].exists()


def test_a_world_whose_server_dies_at_once_goes_on_from_its_beginning(serve: Serve, tmp_path: Path) -> None:
    state, died = tmp_path / "state", tmp_path / "died"

    with serve(limits=LOOSE, state=state) as (url, server):
        table_of(server)._every = 1 << 30
        with player(url) as ann:
            ticket, _ = ann.until(type="welcome")["ticket"], ann.until(type="state")
            written(server)
            (kept,) = state.glob("world-*-0")
            begun = kept.read_bytes()
            ann.say(type="reset", prompt=2)
            ann.until(type="state")
            written(server)
            assert kept.read_bytes() != begun
            shutil.copytree(state, died)
    with serve(limits=LOOSE, state=died) as (url, server), player(url, ticket) as ann:
        assert ann.until(type="welcome")["ticket"] == ticket
        ann.frame()
        game = table_of(server).game
        assert np.array_equal(game.start, game.prompts[2])


def test_a_world_that_was_lost_before_it_began_is_nobody_elses(serve: Serve) -> None:
    with serve() as (url, server):
        with player(url) as ann:
            own = ann.until(type="state")
            ann.say(type="choose", settings={**own["settings"], "seed": 7})
            while ann.frame()["known"] < 9:
                pass
            ann.say(type="pace", mode="pause")
            ann.until(type="state", mode="pause")
        server.room.clear(server.tables[0])
        server.tables[0].take_up(SavedGame(), "ticket")
        with player(url, "ticket") as ben:
            begun = ben.until(type="state")
            assert all(begun[name] == own[name] for name in ("settings", "mode"))
            assert begun["known"] == 1


def test_worlds_of_another_bundle_are_left_alone(tmp_path: Path) -> None:
    kept = {}
    for bundle in ("one", "two"):
        saves = SavedGames(tmp_path, bundle)
        assert not list(saves.find(3))
        saves.put(0, "ticket", bundle.encode())
        saves.close()
        kept[bundle] = tmp_path / f"world-{bundle}-0"
    for bundle, path in kept.items():
        assert list(SavedGames(tmp_path, bundle).find(3)) == [(0, "ticket", bundle.encode())]
        assert path.stat().st_mode & 0o777 == 0o600
    kept["one"].replace(kept["two"])
    assert not list(SavedGames(tmp_path, "two").find(3))


@pytest.mark.parametrize("content", [b"", b"something else", b"[" * 100_000, b'{"bundle": "one"}\nworld'])
def test_a_damaged_world_is_told(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    saves = SavedGames(tmp_path, "one")
    saves.put(1, "ticket", b"world")
    saves.close()
    (tmp_path / "world-one-0").write_bytes(content)
    assert list(saves.find(2)) == [(1, "ticket", b"world")]
    assert "world-one-0 is damaged" in caplog.text


def test_a_damaged_snapshot_is_one_error(game: Game) -> None:
    whole = game.snapshot()
    with np.load(io.BytesIO(whole)) as file:
        head, *streams = (file[name] for name in file.files)
    marks = np.frombuffer(bytes(head).replace(b'"here": 0', b'"here": 9'), np.uint8)
    for given in ([], [head], [head, streams[0]], [marks, *streams], [head, *streams[:1], head]):
        np.savez(damaged := io.BytesIO(), *given)
        with pytest.raises(UsageError, match="this is no snapshot"):
            game.restore(damaged.getvalue())
    with pytest.raises(UsageError, match="this is no snapshot"):
        game.restore(whole[: len(whole) // 2])
    game.restore(whole)


def test_servers_on_one_folder_take_turns(world: Path, tmp_path: Path) -> None:
    """The second one waits for the first to end, and says for whom."""
    command = [sys.executable, "-m", "diagd", "serve", str(world), "--sessions", "1", "--port", "0"]
    command += ["--set", f"state={tmp_path / 'state'}"]
    with turn(tmp_path / "state"):
        second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert second.stderr is not None
        assert "waiting for" in second.stderr.readline()
        assert not (tmp_path / "state" / "token").exists()
    assert "http://127.0.0.1:" in second.stdout.readline()
    second.terminate()
    assert second.wait(60) == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGTERM"])
def test_a_server_that_is_interrupted_again_ends_as_it_began_to(world: Path, name: str) -> None:
    command = [sys.executable, "-c", AGAIN, "serve", str(world), "--sessions", "1", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as server:  # type: ignore[call-overload]
        assert "http://127.0.0.1:" in server.stdout.readline()
        server.send_signal(getattr(signal, name))
        said = server.communicate(timeout=60)
    assert (server.returncode, said[0].endswith("closed\n"), said[1]) == (0, True, "")


@pytest.mark.parametrize("name", ["token", "world-0"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="and not worlds that diagd serve keeps; nothing is replaced"):
        SavedGames(tmp_path, "one")
    assert (tmp_path / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_damaged_token_is_named(tmp_path: Path) -> None:
    SavedGames(tmp_path, "one").close()
    (tmp_path / "token").write_text('{"kind":"diagd worlds","token":""}')
    with pytest.raises(UsageError, match="token is damaged; remove it"):
        SavedGames(tmp_path, "one")
