"""The server over its socket: what it refuses, who plays, and that nothing said to it ends it."""

from __future__ import annotations

import json
import random
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from diagd.bundle import Bundle
from diagd.cli.main import main
from diagd.play.messages import without_paths
from diagd.play.opening import GameOptions
from diagd.play.record import read_record
from diagd.play.server import Address, Limits
from diagd.play.site import SOCKET, Public, Site
from diagd.runtime.actions import describe
from diagd.runtime.pictures import read_frames
from tests.play.conftest import Serve, table_of


class Player:
    """A scripted page."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.first: dict[str, Any] | None = None  # message, not looked at yet
        self.echoed: dict[float, dict[str, Any]] = {}  # frames, by the stamp of the input they show first

    def say(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def hear(self, seconds: float = 120.0) -> dict[str, Any]:
        """The next message; updates are acknowledged."""
        if (first := self.first) is not None:
            self.first = None
            return first
        data = self.socket.recv(timeout=seconds)
        if isinstance(data, str):
            told: dict[str, Any] = json.loads(data)
            return told
        length = int.from_bytes(data[:4], "big")
        header: dict[str, Any] = json.loads(data[4 : 4 + length])
        assert len(data) == 4 + length + sum(header["sizes"])
        header["picture"] = data[4 + length :]
        if header["kind"] == "frame":
            self.say(type="ack", id=header["id"])
            if (stamp := header.get("echo")) is not None:
                self.echoed.setdefault(stamp, header)
        return header

    def until(self, **wanted: Any) -> dict[str, Any]:
        """The next message that has all that is wanted."""
        for _ in range(200_000):
            message = self.hear()
            if all(message.get(name) == value for name, value in wanted.items()):
                return message
        raise AssertionError(f"never heard {wanted}")

    def frame(self) -> dict[str, Any]:
        """The next frame that was decoded."""
        while "ms" not in (message := self.until(kind="frame")):
            pass
        return message

    def hold(self, stamp: float, *keys: str) -> dict[str, Any]:
        """Say what is held, as a page does five times a second; what is heard meanwhile, else nothing."""
        self.say(type="input", t=stamp, keys=keys)
        with suppress(TimeoutError):
            return self.hear(0.2)
        return {}

    def press(self, stamp: float, *keys: str) -> dict[str, Any]:
        """Hold keys until a frame shows them; that one."""
        while stamp not in self.echoed:
            self.hold(stamp, *keys)
        return self.echoed[stamp]


def parts(url: str) -> tuple[str, str]:
    address, _, token = url.partition("/#")
    return address, token


@contextmanager
def player(url: str, ticket: str = "", **hello: Any) -> Iterator[Player]:
    address, token = parts(url)
    socket_url = address.replace("http", "ws") + "/socket"
    patient: dict[str, Any] = {"open_timeout": 120, "max_size": None, "compression": None}
    with connect(socket_url, origin=Origin(address), **patient) as socket:
        one = Player(socket)
        one.say(**{"type": "hello", "version": 1, "token": token, "ticket": ticket, **hello})
        with suppress(ConnectionClosed):
            one.first = one.hear()  # so that whoever comes after this one is seated after this one
        yield one


def fetch(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_pages_go_to_those_who_came_by_our_own_address(serve: Serve) -> None:
    with serve() as (url, _):
        address, _ = parts(url)
        host = address.removeprefix("http://")
        status, body, headers = fetch(address + "/")
        assert status == 200
        assert b"<canvas" in body
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        for name in ("main.js", "keys.js", "link.js", "screen.js", "figures.js", "style.css", "icon.svg"):
            assert fetch(f"{address}/{name}")[0] == 200
        for name in ("../server.py", "%2e%2e/server.py", "..%2fserver.py", "index.html/../x", "nothing"):
            assert fetch(f"{address}/{name}")[0] == 404
        port = host.rpartition(":")[2]
        for wrong in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1",
            "127.0.0.1:1",
            f"127.0.0.1.evil.example:{port}",
            "",
        ):
            assert fetch(address + "/", Host=wrong)[0] in (400, 403), wrong
        for own in ("localhost", socket.gethostname(), f"{socket.gethostname()}.local"):
            assert fetch(address + "/", Host=f"{own}:{port}")[0] == 200
        assert fetch(address + "/", Origin="http://evil.example")[0] == 403


def test_a_proxy_a_tunnel_or_a_container_leads_here(serve: Serve) -> None:
    """With the Host that a browser sends, or with the server's own; other addresses stay refused."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = Address(port=port, public=("https://Play.example/worlds", "http://localhost:9000"))
    with serve(address=address) as (url, server):
        assert url == f"https://Play.example/worlds/#{server.address.token}"
        here, hello = f"127.0.0.1:{port}", {"type": "hello", "version": 1, "token": server.address.token}
        for host, origin in (
            ("play.example", "https://play.example"),
            ("Play.example:443", "https://play.example"),
            ("localhost:9000", "http://localhost:9000"),
            (here, "https://play.example"),
        ):
            status, _, headers = fetch(f"http://{here}/", Host=host)
            assert status == 200
            assert "wss://play.example" in headers["Content-Security-Policy"].split(";")[1].split()
            with (
                socket.create_connection(("127.0.0.1", port)) as plain,
                connect(f"ws://{host}/socket", sock=plain, origin=Origin(origin)) as one,
            ):
                one.send(json.dumps(hello | {"ticket": ""}))
                assert json.loads(one.recv())["ticket"]
        for host, origin in (
            ("play.example", "http://evil.example"),
            ("evil.example", "https://play.example"),
        ):
            assert fetch(f"http://{here}/", Host=host, Origin=origin)[0] == 403


def test_ports_that_browsers_leave_out_are_known() -> None:
    site = Site("::", 80)
    for host in ("localhost", "localhost:80", "192.0.2.1", "[::1]", "[::1]:80", socket.gethostname()):
        assert site.refusal(SOCKET, host, f"http://{host}") is None, host
    for wrong in ("evil.example", "localhost:8080", "[::1]:443", "", "localhost:80:80", "[::1", None):
        assert site.refusal(SOCKET, wrong, f"http://{wrong}") is not None, wrong
    assert Site("::", 8765).refusal("/", "localhost", None) is not None
    told: TypeAdapter[tuple[str, ...]] = TypeAdapter(Public)
    given = ("https://a.example:443/x/", "http://b.example:80", "https://c.example:80", "http://d:8080/:80")
    assert told.validate_python(given) == (
        "https://a.example/x",
        "http://b.example",
        "https://c.example:80",
        "http://d:8080/:80",
    )


@pytest.mark.parametrize(("host", "own"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]")])
def test_a_page_that_is_served_everywhere_is_found_here(serve: Serve, host: str, own: str) -> None:
    with serve(address=Address(host, 0)) as (url, _):
        address, _ = parts(url)
        assert address.rpartition(":")[0] == f"http://{own}"
        assert fetch(address + "/")[0] == 200


@pytest.mark.parametrize("address", ["play.example", "ftp://a", "https://a@b", "https://", "https://a/?x"])
def test_what_is_no_address_of_a_page_is_refused(
    world: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(world), "--set", f"public={address}"]) == 2
    assert "expected addresses such as https://play.example.com/worlds" in capsys.readouterr().err


@pytest.mark.parametrize("origin", [None, "http://evil.example", "null", "https://127.0.0.1"])
def test_sockets_of_other_pages_are_refused(serve: Serve, origin: str | None) -> None:
    with serve() as (url, _):
        socket = parts(url)[0].replace("http", "ws") + "/socket"
        with pytest.raises(InvalidStatus), connect(socket, origin=origin):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize(
    "hello",
    [
        {"token": "wrong"},
        {"token": ""},
        {"token": "é"},
        {"version": 2},
        {"type": "branch"},
        {"more": 1},
        {"token": 7},
    ],
)
def test_without_the_token_nothing_is_told(serve: Serve, hello: dict[str, Any]) -> None:
    with serve() as (url, _), player(url, **hello) as one:
        with pytest.raises(ConnectionClosed) as closed:
            one.hear()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4003


def test_who_says_nothing_is_let_go(serve: Serve) -> None:
    with serve(limits=Limits(hello_seconds=0.2)) as (url, _):
        address, _ = parts(url)
        socket_url = address.replace("http", "ws") + "/socket"
        with connect(socket_url, origin=Origin(address)) as socket, pytest.raises(ConnectionClosed):
            socket.recv(timeout=120)


def test_the_model_plays_until_a_key_is_pressed(serve: Serve, small_wham: Bundle, tmp_path: Path) -> None:
    """Its actions are told and recorded as a player's are, and play again to the token."""
    record, prompt = tmp_path / "played.ndjson", tmp_path / "start.npy"
    np.save(prompt, np.random.default_rng(0).integers(1, 64, (1, 3, 5)))
    options = GameOptions(prompts=(prompt,), record=record)
    with serve(options, bundle=small_wham.path) as (url, _), player(url) as one:
        assert one.until(type="welcome")["autopilot"]
        assert not one.until(type="state")["autopilot"]
        one.say(type="autopilot", on=True)
        known = one.until(type="state", autopilot=True)["known"]
        while (first := one.frame())["known"] <= known:  # decoded before, and shown behind what was told
            pass
        seen = [first["action"], *(one.frame()["action"] for _ in range(3))]
        assert all(len(action["sticks"]) == 4 for action in seen)
        one.say(type="input", t=1.0, keys=["KeyA"])
        assert not one.until(type="state", autopilot=False)["autopilot"]
        assert one.press(1.0, "KeyA")["action"] == {"sticks": [-1.0, 0.0, 0.0, 0.0]}
    codec, played = small_wham.manifest.actions, tmp_path / "played.npy"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    ids = [line["action"] for line in lines if "frame" in line]
    assert codec is not None
    assert seen[-1] in [describe(codec, np.array(action)) for action in ids]
    command = ["generate", str(small_wham.path), "--prompt", str(record), "--output", str(played)]
    assert main(command) == 0
    assert len(np.load(played)) == len(ids)


def test_a_key_moves_the_world_and_commands_move_it_back(serve: Serve, tmp_path: Path) -> None:
    record = tmp_path / "played.ndjson"
    with serve(GameOptions(record=record)) as (url, _), player(url) as one:
        welcome = one.until(type="welcome")
        assert welcome["size"] == [16, 24]
        assert len(one.until(kind="gallery")["sizes"]) == 3
        frame = one.press(123.5, "ArrowLeft")
        assert frame["action"] == {"action": "left"}
        assert frame["picture"].startswith(b"\x89PNG")
        assert set(frame["ms"]) == {"wait", "decode", "pixels", "encode"}
        one.say(type="pace", mode="pause")
        one.until(type="state", mode="pause")
        one.say(type="branch")
        known = one.until(type="state", here=1)["known"]
        one.say(type="rewind", frames=1)
        assert one.until(type="state")["known"] == known - 1
        one.say(type="visit", number=1)
        assert one.until(type="state")["known"] == known
        one.say(type="reset", prompt=2)
        assert one.until(type="state")["known"] == 1
        one.socket.send(bytes(16 * 24 * 4))
        assert one.until(type="state")["known"] == 1
        settings = one_state(one)["settings"]
        one.say(type="choose", settings=settings | {"decoder": "k=1 chained", "seed": 4})
        assert one.until(type="state")["settings"]["seed"] == 4
        one.say(type="pace", mode="live", rate=30)
        one.frame()
        one.say(type="save")
        assert b"diagd play 1" in one.until(kind="record")["picture"]
        one.say(type="film")
        film = tmp_path / "film.mp4"
        film.write_bytes(one.until(kind="film")["picture"])
        assert next(iter(read_frames(film))).shape == (16, 24, 3)
    assert len(read_record(record)[1]) > 8


def one_state(one: Player) -> dict[str, Any]:
    one.say(type="pace")
    return one.until(type="state")


def test_in_step_mode_a_tap_is_a_frame(serve: Serve) -> None:
    with serve(rate=0.1) as (url, _), player(url) as one:  # a key that is held has another frame much later
        one.say(type="pace", mode="step")
        known = one.until(type="state", mode="step")["known"]
        for count in range(1, 4):
            one.say(type="input", t=float(count), keys=["ArrowUp"])
            while one.hold(float(count)).get("known", 0) < known + count:
                pass
        assert one_state(one)["known"] == known + 3


def test_a_slow_page_gets_fresh_frames_and_no_backlog(serve: Serve) -> None:
    with serve(rate=200) as (url, server), player(url) as one:
        one.frame()
        first = one.socket.recv(timeout=120, decode=False)  # acknowledges nothing
        second = one.socket.recv(timeout=120, decode=False)
        one.say(type="input", t=3.5, keys=["ArrowLeft"])
        with pytest.raises(TimeoutError):
            one.socket.recv(timeout=0.7)
        seen = [json.loads(data[4 : 4 + int.from_bytes(data[:4], "big")])["id"] for data in (first, second)]
        while table_of(server)._number <= seen[1] + 3:
            time.sleep(0.01)
        one.say(type="ack", id=seen[1])
        frame = one.until(kind="frame", echo=3.5)  # of a frame that nobody saw, but in one that is seen
        assert frame["id"] > seen[1] + 3
        assert "ms" in frame


def test_others_wait_and_a_ticket_brings_back(serve: Serve) -> None:
    with serve() as (url, _):
        with player(url) as one:
            ticket = one.until(type="welcome")["ticket"]
            one.say(type="branch")
            one.until(type="state", here=1)
            with player(url) as other:
                assert other.until(type="waiting")["place"] == 1
                other.say(type="reset")
                other.say(type="input", t=1.0, keys=["ArrowUp"])
                assert one_state(one)["here"] == 1
        with player(url, ticket="x" * 20) as other:
            assert other.until(type="waiting")["place"] == 1
            with player(url, ticket=ticket) as again:
                again.until(type="welcome")
                assert one_state(again)["here"] == 1
                with player(url, ticket=ticket) as third:
                    third.until(type="welcome")
                    with pytest.raises(ConnectionClosed) as closed:
                        again.until(type="never")
                    assert closed.value.rcvd is not None
                    assert closed.value.rcvd.code == 4001


def test_too_many_messages_end_a_connection(serve: Serve) -> None:
    with serve(limits=Limits(messages_per_second=50)) as (url, _), player(url) as one:
        with pytest.raises(ConnectionClosed) as closed:
            for number in range(2000):
                one.say(type="ack", id=number)
            one.until(type="never")
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4029


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("{", "json"),
        ('{"type":"fly"}', "union_tag"),
        ('{"type":"rewind","frames":0}', "frames"),
        ('{"type":"rewind","frames":"3"}', "frames"),
        ('{"type":"visit","number":99}', "99"),
        ('{"type":"reset","prompt":99}', "99"),
        (json.dumps({"type": "input", "t": 1, "keys": ["A" * 25]}), "keys"),
        (json.dumps({"type": "input", "t": 1, "keys": ["KeyA"] * 33}), "keys"),
        ('{"type":"input","t":1,"dx":1e9}', "dx"),
        ('{"type":"input","t":NaN}', "t"),
        ('{"type":"branch","path":"/etc/passwd"}', "path"),
        ('{"type":"ack","id":1' + " " * 4096 + "}", "4096"),
        ("[" * 2000, "json"),
        (bytes(7), "7 bytes"),
    ],
)
def test_wrong_messages_are_refused_and_play_goes_on(serve: Serve, message: str | bytes, says: str) -> None:
    with serve() as (url, _), player(url) as one:
        one.until(type="welcome")
        one.socket.send(message)
        assert says in one.until(type="error")["text"]
        one.frame()


def test_messages_that_are_too_long_end_a_connection(serve: Serve) -> None:
    with serve() as (url, _):
        with player(url) as one, pytest.raises(ConnectionClosed):
            one.socket.send(bytes(1 << 20))
            one.until(type="never")
        with player(url) as other:
            assert other.hear()["type"] in ("welcome", "waiting")


def test_marks_are_bounded(serve: Serve) -> None:
    with serve() as (url, _), player(url) as one:
        for _ in range(65):
            one.say(type="branch")
            message = one.until(type="state")
        assert len(message["marks"]) == 65
        one.say(type="branch")
        assert "marked already" in one.until(type="error")["text"]


@pytest.mark.parametrize(
    "text",
    [
        "cannot read /home/secret/world.diagd: it is damaged",
        r"C:\Users\secret\world.diagd is none",
        "'/a/secret' is gone",
    ],
)
def test_errors_name_no_files(text: str) -> None:
    shown = without_paths(text)
    assert "secret" not in shown
    assert "(a file)" in shown


MESSAGES = (
    '{"type":"hello","version":1,"token":"x"}',
    '{"type":"input","t":12.5,"keys":["ArrowLeft","Space"],"dx":1,"dy":-2.5,"axes":[0,1]}',
    '{"type":"ack","id":3}',
    '{"type":"rewind","frames":1}',
    '{"type":"branch"}',
    '{"type":"visit","number":0}',
    '{"type":"choose","settings":{"decoder":"k=1 serial","temperature":1,"top_k":0,"top_p":0.9,"seed":1}}',
    '{"type":"pace","mode":"live","rate":10}',
    '{"type":"save"}',
)


def mangled(chance: random.Random) -> str | bytes:
    """A message as it should be, changed here and there, or nothing like one."""
    kind = chance.random()
    if kind < 0.1:
        return chance.randbytes(chance.randrange(40))
    if kind < 0.2:
        return "".join(chance.choice('{}[]":,0123eE+-.\\utfnull ') for _ in range(chance.randrange(60)))
    text = list(chance.choice(MESSAGES))
    for _ in range(chance.randrange(4)):
        place = chance.randrange(len(text))
        text[place : place + chance.randrange(3)] = chance.choice(
            ['"', "{", "9" * 20, "-", "\u2028", "é", "null", ""]
        )
    return "".join(text)


def test_a_hundred_thousand_mangled_messages_leave_it_serving(serve: Serve) -> None:
    chance = random.Random(0)
    with serve(rate=1) as (url, _), player(url) as one:
        one.until(type="welcome")
        for number in range(100_000):
            one.socket.send(mangled(chance))
            if number % 5000 == 0:  # who reads nothing for long is taken for gone
                with suppress(TimeoutError):
                    while True:
                        one.hear(0)
        one.socket.send(" " * 5000)
        while "4096" not in one.until(type="error")["text"]:
            one.socket.send(" " * 5000)  # texts that were not read in time are dropped
        while paced(one)["type"] != "state":
            pass
        one.say(type="reset", prompt=0)
        one.frame()


def paced(one: Player) -> dict[str, Any]:
    """Ask for time to run; what is answered."""
    one.say(type="pace", mode="live", rate=60)
    while (message := one.hear()).get("rate") != 60.0 and message.get("type") != "error":
        pass
    return message
