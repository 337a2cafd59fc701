"""Terminals: what is drawn, what keys are read, and that all is as before afterwards."""

from __future__ import annotations

import base64
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from diagd.play.drawing import Blocks, fitted, kitty, sixel
from diagd.play.terminal import QUIT, STOP, Abilities, Held, Press, _raw, _read, presses

PICTURE = np.random.default_rng(0).integers(0, 256, (72, 96, 3), dtype=np.uint8)


def test_kitty_gets_the_pixels_in_pieces() -> None:
    drawn = kitty(PICTURE, 24, 80)
    pieces = re.findall(rb"\x1b_G([^;]*);([^\x1b]*)\x1b\\", drawn)
    assert base64.b64decode(b"".join(data for _, data in pieces)) == PICTURE.tobytes()
    assert all(len(data) <= 4096 for _, data in pieces)
    assert b"s=96,v=72" in pieces[0][0]
    assert [head[-1:] for head, _ in pieces] == [b"1"] * (len(pieces) - 1) + [b"0"]


def painted(data: bytes) -> np.ndarray:
    """What a sixel terminal shows."""
    head = re.search(rb'\x1bPq"1;1;(\d+);(\d+)', data)
    assert head
    width, height = int(head[1]), int(head[2])
    screen, colors, color = np.full((height + 6, width, 3), -1), {}, 0
    left = top = 0
    for token in re.findall(rb"#\d+(?:;2;\d+;\d+;\d+)?|!\d+.|[\x3f-\x7e]|\$|-", data[head.end() : -2]):
        if token[:1] == b"#":
            color, *rest = map(int, token[1:].split(b";"))
            if rest:
                colors[color] = rest[1:]
        elif token in (b"$", b"-"):
            left, top = 0, top + 6 * (token == b"-")
        else:
            count = int(token[1:-1]) if token[:1] == b"!" else 1
            for row in range(6):
                if (token[-1] - 63) >> row & 1:
                    screen[top + row, left : left + count] = colors[color]
            left += count
    assert (screen[height:] == -1).all()
    return screen[:height]


@pytest.mark.parametrize("size", [(72, 96), (7, 5), (13, 200)])
def test_sixel_shows_every_pixel_in_a_near_colour(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    shown = painted(sixel(picture, 40, 100))
    scale = shown.shape[0] // size[0]
    assert np.array_equal(shown[::scale, ::scale].repeat(scale, 0).repeat(scale, 1), shown)
    assert np.abs(shown[::scale, ::scale] * 2.55 - picture).max() <= 28


def test_half_blocks_draw_what_changed() -> None:
    blocks = Blocks()
    first = blocks(PICTURE, 36, 96)
    assert first.count("\u2580".encode()) == 36 * 96
    assert b"38;2;%d;%d;%d;48;2;%d;%d;%dm" % (*PICTURE[0, 0], *PICTURE[1, 0]) in first
    changed = PICTURE.copy()
    changed[5, 7] = 255 - changed[5, 7]
    again = blocks(changed, 36, 96)
    assert again.count("\u2580".encode()) == 1
    assert b"\x1b[3;8H" in again
    assert blocks(changed, 36, 96) == b"\x1b[0m"


def test_pictures_keep_their_proportions() -> None:
    assert fitted(72, 96, 24, 80) == (24, 64)
    assert fitted(72, 96, 100, 40) == (15, 40)
    assert fitted(1000, 1, 5, 5)[1] == 1


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"wA1 ", [("KeyW", "tap"), ("KeyA", "tap"), ("Digit1", "tap"), ("Space", "tap")]),
        (b"\x1b[A\x1bOD", [("ArrowUp", "tap"), ("ArrowLeft", "tap")]),
        (b"\x1b[97;1:1u\x1b[97;1:2u\x1b[97;1:3u", [("KeyA", "down"), ("KeyA", "down"), ("KeyA", "up")]),
        (b"\x1b[1;1:3A\x1b[32u", [("ArrowUp", "up"), ("Space", "down")]),
        (b"\x03\x1b[99;5u\x1b[99;5:1u", [(QUIT, "tap"), (QUIT, "down"), (QUIT, "down")]),
        (b"\x1b[122;5:1u\x1b[122;1:1u", [(STOP, "down"), ("KeyZ", "down")]),
        (b"\x7f\x1b[?0u\xff", [("Backspace", "tap")]),
        (b"\x1b[0?u\x1b[>1;2c\x1b[?1;2$yA", [("KeyA", "tap")]),
        (b"\x1b[" + b"9" * 5000 + b"u\x1b[97;" + b"1" * 5000 + b":1u", []),
        (b"\x1b[57441;2:1u", [("ShiftLeft", "down")]),
    ],
)
def test_keys_are_read(data: bytes, expected: list[tuple[str, str]]) -> None:
    assert [tuple(press) for press in presses(data)] == expected


def test_noise_is_no_key_and_no_error() -> None:
    random = np.random.default_rng(0)
    for _ in range(2000):
        list(presses(b"\x1b[" + random.bytes(8) + b"u"))
        list(presses(bytes(random.choice(list(b"\x1b[;:0123456789uA~?"), 12))))


def test_taps_decay_and_held_keys_stay() -> None:
    held = Held()
    held.take(Press("KeyA", "tap"), 0.0)
    held.take(Press("KeyW", "down"), 0.1)
    assert held.at(0.2) == ("KeyA", "KeyW")
    assert held.at(0.3) == ("KeyW",)
    held.take(Press("KeyW", "up"), 9.0)
    assert held.at(9.0) == ()


def test_abilities_are_what_the_terminal_says() -> None:
    answer = b"\x1b_Gi=31;OK\x1b\\\x1b[?0u\x1b[?62;4;22c"
    assert Abilities.read(answer, {}) == Abilities(kitty=True, sixel=True, releases=True)
    assert Abilities.read(answer, {"TMUX": "1"}) == Abilities(releases=True)
    assert Abilities.read(b"\x1b[?64;22c", {}) == Abilities()
    assert Abilities.read(b"", {}) == Abilities()


def test_whose_terminal_is_gone_has_left() -> None:
    ours, theirs = pty.openpty()
    with _raw(theirs):
        assert _read(theirs, 0) == b""
        os.write(ours, b"q")
        assert _read(theirs, 60) == b"q"
        os.close(ours)
        with pytest.raises(KeyboardInterrupt):
            _read(theirs, 60)
    os.close(theirs)


def _resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))


@pytest.mark.parametrize("ending", ["q", "SIGTERM", "SIGINT"])
def test_a_world_is_played_and_the_terminal_is_as_before(
    world: Path, tmp_path: Path, ending: str, request: pytest.FixtureRequest
) -> None:
    ours, theirs = pty.openpty()
    _resize(theirs, 24, 60)
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-m", "diagd", "play", str(world), "--terminal"]
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        environment.pop(name, None)
    record = tmp_path / "played.ndjson"
    process = subprocess.Popen(
        [*command, "--record", str(record), "--fps", "60"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    request.addfinalizer(process.kill)
    seen, end, pressed, paused, ended = b"", time.monotonic() + 300, 0, False, False
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        assert time.monotonic() < end, seen[-500:]
        if select.select([ours], [], [], 0.05)[0]:
            seen += os.read(ours, 1 << 16)
        if b"\x1b[c" in seen and b"\x1b[?1049h" not in seen:
            os.write(ours, b"\x1b[?64;22c")
        elif b"frame 5 " in seen and not pressed:
            _resize(theirs, 20, 50)
            pressed = seen.count(b"frame ")
        elif pressed and not paused and '"action":[35]' in record.read_text():  # written with frame 32
            os.write(ours, b"p" * 101)
            paused = True
        elif pressed and not paused and seen.count(b"frame ") > pressed:
            os.write(ours, b"\x1b[")
            time.sleep(0.1)  # a slow line brings the rest later
            os.write(ours, b"A")
            pressed = seen.count(b"frame ")
        elif b"paused" in seen and not ended:
            ended = True
            if ending == "q":
                os.write(ours, b"q")
            else:
                process.send_signal(getattr(signal, ending))
    assert process.returncode == 0
    assert termios.tcgetattr(theirs) == before
    assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"\x1b[?1049h")
    assert "\u2580".encode() in seen
    assert b"\x1b[23;1H\x1b[0m\x1b[2KLeft/A left  Right/D right  Up/W up" in seen
    assert seen.count(b"\x1b[2J") > 1 and b"\x1b[20;1H" in seen.split(b"paused")[0]
    assert '"action":[35]' in record.read_text()  # 32 codes, then noop, left, right, up
    os.close(ours)
    os.close(theirs)


SHELL = """import fcntl, os, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp("sh", ["sh", "-i"])
"""


def test_a_job_that_is_stopped_gives_the_terminal_back_and_goes_on(
    world: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """By Ctrl-Z, also while its world stands still."""
    ours, theirs = pty.openpty()
    _resize(theirs, 24, 60)
    environment = {**os.environ, "TERM": "xterm-256color", "PS1": "shell> ", "ENV": ""}
    environment.pop("NO_COLOR", None)
    shell = subprocess.Popen(
        [sys.executable, "-c", SHELL], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    request.addfinalizer(shell.kill)
    seen = b""

    def until(text: bytes) -> bytes:
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < end, seen[-500:]
            if select.select([ours], [], [], 0.05)[0]:
                seen += os.read(ours, 1 << 16)
        before, _, seen = seen.partition(text)
        return before

    def is_cooked() -> bool:
        return bool(termios.tcgetattr(theirs)[3] & termios.ICANON)

    command = f"{sys.executable} -m diagd play {world} --terminal --record {tmp_path / 'played.ndjson'}"
    until(b"shell> ")
    os.write(ours, command.encode() + b"\n")
    until(b"\x1b[c")
    os.write(ours, b"\x1b[?64;22c")
    until(b"frame 5 ")
    assert not is_cooked()
    os.write(ours, b"\x1a")
    until(b"\x1b[?1049l")
    assert b"frame" not in until(b"shell> ")
    assert is_cooked()
    os.write(ours, b"fg\n")
    until(b"\x1b[?1049h")
    until(b"frame ")
    os.write(ours, b"p")  # which a terminal that waits for lines would keep
    until(b"paused")
    while select.select([ours], [], [], 1.0)[0]:  # a frame may say so ahead of the answer to the key
        os.read(ours, 1 << 16)
    before = termios.tcgetattr(theirs)
    os.write(ours, b"\x1a")
    until(b"shell> ")
    os.write(ours, b"fg\n")
    until(b"\x1b[?1049h")
    assert "\u2580".encode() in until(b"paused")
    assert termios.tcgetattr(theirs) == before
    os.write(ours, b"\x1c")  # which ends others as they are
    until(b"\x1b[?1049l")
    until(b"recorded: ")
    until(b"shell> ")
    assert is_cooked()
    os.write(ours, b"exit\n")
    assert shell.wait(60) == 0
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("ending", ["q", "SIGHUP"])
def test_a_terminal_that_nobody_reads_any_more_keeps_no_player(
    world: Path, tmp_path: Path, ending: str, request: pytest.FixtureRequest
) -> None:
    ours, theirs = pty.openpty()
    _resize(theirs, 60, 200)
    command = [sys.executable, "-m", "diagd", "play", str(world), "--terminal", "--fps", "60"]
    process = subprocess.Popen(
        [*command, "--record", str(tmp_path / "played.ndjson")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    request.addfinalizer(process.kill)
    seen = b""
    while b"frame 5 " not in seen:
        seen += os.read(ours, 1 << 16)
    full = 0
    while full < 20:
        full = 0 if select.select([], [theirs], [], 0)[1] else full + 1
        time.sleep(0.01)
    if ending == "q":
        os.write(ours, b"q")
    else:
        process.send_signal(getattr(signal, ending))
    assert process.wait(60) == 0
    left = b""
    while select.select([ours], [], [], 0)[0]:
        left += os.read(ours, 1 << 16)
    assert b"\x1b[?1049l" in left
    os.close(ours)
    os.close(theirs)


def test_without_a_terminal_it_says_so(world: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diagd", "play", str(world), "--terminal"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "needs a terminal" in done.stderr


def test_a_browser_that_runs_until_it_is_closed_gets_its_page(world: Path, tmp_path: Path) -> None:
    """As those of terminals do, on machines that have no others."""
    browser, page = tmp_path / "browser", tmp_path / "page"
    code = "import sys, urllib.request as u\npage = u.urlopen(sys.argv[1].partition('#')[0], timeout=60)\n"
    browser.write_text(f"#!{sys.executable}\n{code}open({str(page)!r}, 'wb').write(page.read())\n")
    browser.chmod(0o700)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "diagd", "play", str(world), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--record", str(tmp_path / "played.ndjson")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "BROWSER": str(browser)},
    )
    end = time.monotonic() + 100
    while not (page.exists() and page.read_bytes().endswith(b"</html>\n")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert b"<html" in page.read_bytes()
    os.close(ours)
    os.close(theirs)
