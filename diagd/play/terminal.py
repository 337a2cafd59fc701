"""A world in a terminal: what it sends when keys are pressed, and what is drawn on it."""

from __future__ import annotations

import base64
import os
import re
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diagd.errors import UsageError
from diagd.play.controls import Inputs
from diagd.play.game import Game, Shown
from diagd.play.pictures import Pictures
from diagd.play.stage import GameLoop, Stage

HELD_SECONDS: Final = 0.25
"""A key of a terminal that tells no releases is held for so long after it was last repeated."""

QUIT: Final = "Quit"
_CTRL: Final = 4  # bit of the modifiers in the protocol, one of which is added
_ARROWS: Final = {"A": "ArrowUp", "B": "ArrowDown", "C": "ArrowRight", "D": "ArrowLeft"}
_NAMED: Final = {
    3: QUIT,
    4: QUIT,
    8: "Backspace",
    9: "Tab",
    13: "Enter",
    27: "Escape",
    32: "Space",
    127: "Backspace",
    57441: "ShiftLeft",
    57442: "ControlLeft",
}
_SEQUENCE: Final = re.compile(rb"\x1b\[([0-?]*)[ -/]*([@-~])|\x1bO([A-D])|([\x00-\x7f])|[\x80-\xff]")
_TOLD: Final = re.compile(r"([0-9]{0,7})(?::[0-9:]*)?(?:;([0-9]{0,7})(?::([0-9]*))?(?:;.*)?)?")


class Press(NamedTuple):
    """A key and what happened to it; ``tap``: it was pressed, and nobody will tell of its release."""

    code: str
    kind: Literal["down", "up", "tap"]


def presses(data: bytes) -> Iterator[Press]:
    """Keys in what was read, of the kitty keyboard protocol or any other terminal."""
    for match in _SEQUENCE.finditer(data):
        numbers, final, arrow, plain = match.groups()
        if arrow:
            yield Press(_ARROWS[arrow.decode()], "tap")
        elif plain:
            if code := _code(plain[0]):
                yield Press(code, "tap")
        elif final and final.decode() in {*_ARROWS, "u"}:
            yield from _told(numbers.decode(), final.decode())


def _told(numbers: str, final: str) -> Iterator[Press]:
    """A key of ``CSI key ; modifiers : event final``; without an event it is a plain arrow."""
    match = _TOLD.fullmatch(numbers)
    if match is None:
        return
    key, modifiers, event = (part or "" for part in match.groups())
    code = _ARROWS.get(final) or _code(int(key or 0))
    if code == "KeyC" and (int(modifiers or 1) - 1) & _CTRL:
        code = QUIT
    if code and event:
        yield Press(code, "up" if event == "3" else "down")
    elif code:
        yield Press(code, "down" if final == "u" else "tap")


def _code(number: int) -> str | None:
    letter = chr(number) if number < 128 else ""
    if letter.isalpha():
        return f"Key{letter.upper()}"
    return f"Digit{letter}" if letter.isdigit() else _NAMED.get(number)


class Held:
    """Which keys are held, by presses and the time."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def take(self, press: Press, now: float) -> None:
        """Something happened to a key."""
        self._until.pop(press.code, None)
        if press.kind != "up":
            self._until[press.code] = float("inf") if press.kind == "down" else now + HELD_SECONDS

    def at(self, now: float) -> tuple[str, ...]:
        """Codes that are held, the last pressed last."""
        self._until = {code: until for code, until in self._until.items() if until > now}
        return tuple(self._until)


_ASK: Final = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[?u\x1b[c"
"""Do you draw kitty's graphics, tell releases, and what else can you do? Every terminal answers the last."""

_ANSWERED: Final = re.compile(rb"\x1b\[\?([0-9;]*)c")
_ANSWER_SECONDS: Final = 0.5
_POLL_SECONDS: Final = 0.03
_ENTER: Final = b"\x1b[?1049h\x1b[?25l\x1b[2J"
_LEAVE: Final = b"\x1b[0m\x1b[?25h\x1b[?1049l"
_TELL_RELEASES, _AS_BEFORE = b"\x1b[>11u", b"\x1b[<u"
_BACK: Final = 10
_LINES: Final = 2
"""Of text, below the picture."""


@dataclass(frozen=True)
class Abilities:
    """What a terminal said it can do."""

    kitty: bool = False
    sixel: bool = False
    releases: bool = False

    @classmethod
    def read(cls, answer: bytes, environment: Mapping[str, str]) -> Abilities:
        """From its answer; inside tmux pictures do not get through."""
        attributes = _ANSWERED.search(answer)
        own = "TMUX" not in environment
        return cls(
            kitty=own and b"_Gi=31;OK" in answer,
            sixel=own and attributes is not None and b"4" in attributes[1].split(b";")[1:],
            releases=re.search(rb"\x1b\[\?[0-9]+u", answer) is not None,
        )


def check_terminal(environment: Mapping[str, str]) -> None:
    """Refuse where nothing could be seen; UsageError: there is no terminal, or it shows no colours."""
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        raise UsageError("--terminal needs a terminal for both input and output; play in the browser instead")
    if environment.get("TERM") in (None, "", "dumb") or environment.get("NO_COLOR"):
        raise UsageError("this terminal shows no colours (TERM, NO_COLOR); play in the browser instead")


@contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """Keys as they are pressed; the terminal is as it was however this ends."""
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield
    finally:
        with suppress(termios.error):  # it is gone
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


@contextmanager
def _never_waiting(descriptor: int) -> Iterator[int]:
    """The terminal once more, where what it has no room for raises: whoever reads it may have stopped."""
    try:
        again = os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:  # it is another container's
        again = os.dup(descriptor)
    try:
        yield again
    finally:
        os.close(again)


def _leave(target: int, data: bytes) -> None:
    """Write it ahead of all that nobody has read where that is in the way."""
    import termios

    with suppress(OSError, termios.error):  # nobody looks any more
        try:
            os.write(target, data)
        except BlockingIOError:
            termios.tcflow(target, termios.TCOON)
            termios.tcflush(target, termios.TCOFLUSH)
            os.write(target, data)


def _read(descriptor: int, seconds: float) -> bytes:
    """What was typed meanwhile; KeyboardInterrupt: the terminal is gone, and with it the player."""
    ready, _, _ = select.select([descriptor], [], [], seconds)
    with suppress(OSError):
        if not ready or (typed := os.read(descriptor, 4096)):
            return typed if ready else b""
    raise KeyboardInterrupt


def _ask(source: int, target: int) -> bytes:
    os.write(target, _ASK)
    answer, end = b"", time.monotonic() + _ANSWER_SECONDS
    while not _ANSWERED.search(answer) and time.monotonic() < end:
        answer += _read(source, end - time.monotonic())
    return answer


def play(game: Game, inputs: Inputs, rate: float) -> None:
    """Play until Ctrl-C or Q in a terminal that `check_terminal` found well; closes the game."""
    source, seen = sys.stdin.fileno(), sys.stdout.fileno()
    with _raw(source), _never_waiting(seen) as target:
        abilities = Abilities.read(_ask(source, seen), os.environ)
        try:
            os.write(seen, _ENTER + (_TELL_RELEASES if abilities.releases else b""))
            _Player(game, inputs, rate, abilities, target).run(source)
        finally:
            _leave(target, (_AS_BEFORE if abilities.releases else b"") + _LEAVE)


class _Player:
    """Keys to inputs and commands, updates to the screen."""

    def __init__(self, game: Game, inputs: Inputs, rate: float, abilities: Abilities, target: int) -> None:
        self._abilities = abilities
        self._fit()
        self._game, self._inputs, self._target, self._is_over = game, inputs, target, False
        self._stage = Stage(game, inputs, self._show, self._say, rate)
        self._stage.is_watched = True
        self._game_loop = GameLoop([self._stage])

    def run(self, source: int) -> None:
        """Until the player has had enough."""
        held = Held()
        self._stage.post(lambda: self._stage.look(self._game.reset(self._game.prompts[0])))
        self._game_loop.start()
        try:
            while True:
                now = time.monotonic()
                for press in presses(_read(source, _POLL_SECONDS)):
                    held.take(press, now)
                    if self._command(press):
                        return
                self._inputs.update(held.at(now), stamp=now)
                if self._inputs.has_changed:
                    self._stage.wake()
        finally:
            self._is_over = True
            self._game_loop.close()

    def _command(self, press: Press) -> bool:
        """Do what keys mean that the world has no use for; True: the player leaves."""
        if press.code in self._inputs.controls.keys or press.kind == "up":
            return False
        stage, game = self._stage, self._game
        if press.code == "KeyP":
            stage.mode = "live" if stage.mode == "pause" else "pause"
            self._post(lambda: self._say(self._figures()))
        elif press.code == "Backspace":
            self._post(lambda: stage.look(game.rewind(_BACK)))
        elif press.code == "KeyR":
            self._post(lambda: stage.look(game.reset(game.prompts[0])))
        return press.code in (QUIT, "KeyQ")

    def _post(self, command: Callable[[], None]) -> None:
        with suppress(UsageError):  # of a key that is held, more wait than frames come between
            self._stage.post(command)

    def _show(self, pictures: Pictures, _: Shown | None) -> None:
        """Draw at once, so that nothing is seen half."""
        began, (columns, rows) = b"\x1b[?2026h", self._size
        if shutil.get_terminal_size() != self._size:
            columns, rows = self._fit()
            began += b"\x1b[2J"
        drawn = self._draw(pictures[-1], max(1, rows - _LINES), columns)
        lines = self._line(rows - 1, self._keys()) + self._line(rows, self._figures())
        self._write(began + drawn + lines + b"\x1b[?2026l")

    def _fit(self) -> os.terminal_size:
        """Draw for the terminal as large as it is now."""
        able, self._size = self._abilities, shutil.get_terminal_size()
        self._draw: Draw = kitty if able.kitty else sixel if able.sixel else Blocks()
        return self._size

    def _say(self, text: str) -> None:
        self._write(self._line(self._size.lines, text))

    def _keys(self) -> str:
        """What keys do in this world."""
        named: dict[str, list[str]] = {}
        for code, part in self._inputs.controls.keys.items():
            if not code.startswith(("Pad", "Axis", "Mouse")):
                done = " + ".join(value if isinstance(value, str) else name for name, value in part.items())
                named.setdefault(done, []).append(re.sub("^(Key|Digit|Arrow)", "", code))
        return "  ".join(f"{'/'.join(names)} {done}" for done, names in named.items())

    def _figures(self) -> str:
        pacer, moves = self._stage.pacer, self._stage.mode == "live"
        rate = f"{pacer.fps:.1f} frames/s  {1e3 * pacer.percentile(95):.0f} ms p95" if moves else "paused"
        return f"frame {self._game.known}  {rate}  P pause  Backspace back  R reset  Q quit"

    def _line(self, row: int, text: str) -> bytes:
        return b"\x1b[%d;1H\x1b[0m\x1b[2K" % row + text[: self._size.columns].encode()

    def _write(self, data: bytes) -> None:
        with suppress(OSError):  # nobody looks any more, which reading keys finds too
            while data and not self._is_over:
                if select.select([], [self._target], [], _POLL_SECONDS)[1]:
                    data = data[os.write(self._target, data) :]


ESC, END = b"\x1b", b"\x1b\\"
_CHUNK: Final = 4096
"""Most bytes of a piece of kitty graphics, in base64."""

_LEVELS: Final = 6  # of each colour in sixel, which has 256 registers
_BAND: Final = 6  # rows of pixels of one sixel
_CELL: Final = 2.0  # height of a character over its width, about


Draw = Callable[[Pictures, int, int], bytes]
"""Gives what draws a picture uint8 [height, width, 3] at the top left of so many rows and columns."""


def fitted(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """Characters (rows, columns) that a picture fills in its proportions."""
    across = min(columns, int(rows * _CELL * width / height))
    return max(1, round(across * height / width / _CELL)), max(1, across)


def kitty(picture: Pictures, rows: int, columns: int) -> bytes:
    """The graphics protocol of kitty, which scales by itself; the picture before is replaced."""
    height, width = picture.shape[:2]
    rows, columns = fitted(height, width, rows, columns)
    data = base64.b64encode(np.ascontiguousarray(picture).tobytes())
    pieces = [data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK)]
    head = b"a=T,f=24,s=%d,v=%d,i=1,p=1,q=2,C=1,c=%d,r=%d," % (width, height, columns, rows)
    parts = [ESC + b"[H"]
    for number, piece in enumerate(pieces):
        more = b"m=%d;" % (number + 1 < len(pieces))
        parts.append(ESC + b"_G" + (head if not number else b"") + more + piece + END)
    return b"".join(parts)


def sixel(picture: Pictures, rows: int, columns: int) -> bytes:
    """DEC's graphics: colours are rounded to a cube of 216."""
    scale = max(1, min(columns * 8 // picture.shape[1], rows * 16 // picture.shape[0]))
    big = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    steps = (big.astype(np.uint16) * (_LEVELS - 1) + 127) // 255
    ids = (steps[..., 0] * _LEVELS + steps[..., 1]) * _LEVELS + steps[..., 2]
    height, width = ids.shape
    used = np.unique(ids)
    parts = [ESC + b"[H" + ESC + b'Pq"1;1;%d;%d' % (width, height)]
    for color in used.tolist():
        red, green, blue = (100 * (color // _LEVELS**place % _LEVELS) // (_LEVELS - 1) for place in (2, 1, 0))
        parts.append(b"#%d;2;%d;%d;%d" % (color, red, green, blue))
    weights = 1 << np.arange(_BAND, dtype=np.uint8)
    for top in range(0, height, _BAND):
        band = ids[top : top + _BAND]
        for color in np.unique(band).tolist():
            bits = ((band == color) * weights[: len(band), None]).sum(0, dtype=np.uint8)
            parts.append(b"#%d" % color + _runs(bits) + b"$")
        parts.append(b"-")
    return b"".join([*parts, END])


def _runs(bits: NDArray[np.uint8]) -> bytes:
    """Sixels of one colour, equal neighbours told by their number."""
    starts = np.flatnonzero(np.diff(bits, prepend=bits[0] ^ 1))
    counts = np.diff(starts, append=len(bits)).tolist()
    signs = (bits[starts] + 63).tolist()
    return b"".join(
        b"!%d%c" % pair if pair[0] > 3 else bytes([pair[1]]) * pair[0]
        for pair in zip(counts, signs, strict=True)
    )


class Blocks:
    """Draws two pixels a character; characters that did not change are not drawn again."""

    _before: NDArray[np.uint8] | None = None

    def __call__(self, picture: Pictures, rows: int, columns: int) -> bytes:
        """What a terminal is sent to show uint8 [height, width, 3] in so many character rows and columns."""
        height, width = picture.shape[:2]
        rows, columns = fitted(height, width, rows, columns)
        down = np.arange(2 * rows) * height // (2 * rows)
        across = np.arange(columns) * width // columns
        cells = picture[down][:, across].reshape(rows, 2, columns, 3).swapaxes(1, 2).reshape(rows, columns, 6)
        before = self._before
        changed = np.ones((rows, columns), bool)
        if before is not None and before.shape == cells.shape:
            changed = (cells != before).any(-1)
        self._before = cells
        parts = []
        for row in np.flatnonzero(changed.any(1)).tolist():
            last = -2
            for column in np.flatnonzero(changed[row]).tolist():
                if column != last + 1:
                    parts.append(b"\x1b[%d;%dH" % (row + 1, column + 1))
                parts.append(
                    b"\x1b[38;2;%d;%d;%d;48;2;%d;%d;%dm\xe2\x96\x80" % tuple(cells[row, column].tolist())
                )
                last = column
        return b"".join([*parts, b"\x1b[0m"])
