"""A world in a terminal: what it sends when keys are pressed, and what is drawn on it."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Final, Literal, NamedTuple

from diagd.errors import UsageError
from diagd.play.controls import Inputs
from diagd.play.drawing import Blocks, Draw, kitty, sixel
from diagd.play.game import Game, Shown
from diagd.play.pictures import Pictures
from diagd.play.stage import GameLoop, Stage

assert sys.platform != "win32", "its terminals tell keys otherwise"

HELD_SECONDS: Final = 0.25
"""A key of a terminal that tells no releases is held for so long after it was last repeated."""

QUIT: Final = "Quit"
STOP: Final = "Stop"
_CTRL: Final = 4  # bit of the modifiers in the protocol, one of which is added
_ARROWS: Final = {"A": "ArrowUp", "B": "ArrowDown", "C": "ArrowRight", "D": "ArrowLeft"}
_NAMED: Final = {
    3: QUIT,
    4: QUIT,
    8: "Backspace",
    9: "Tab",
    13: "Enter",
    27: "Escape",
    28: QUIT,
    32: "Space",
    127: "Backspace",
    57441: "ShiftLeft",
    57442: "ControlLeft",
}
_SEQUENCE: Final = re.compile(rb"\x1b\[([0-?]*)[ -/]*([@-~])|\x1bO([A-D])|([\x00-\x7f])|[\x80-\xff]")
_BEGUN: Final = re.compile(rb"\x1b(?:\[[0-?]{0,64}[ -/]*|O)?\Z")
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
    if (int(modifiers or 1) - 1) & _CTRL:
        code = {"KeyC": QUIT, "KeyZ": STOP}.get(code or "", code)
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


def _set_raw(descriptor: int, when: int) -> None:
    """Give keys as they are pressed, that which sends SIGQUIT too: it would leave the terminal so."""
    import termios
    import tty

    tty.setcbreak(descriptor, when)
    modes = termios.tcgetattr(descriptor)
    modes[6][termios.VQUIT] = os.fpathconf(descriptor, "PC_VDISABLE").to_bytes(1, "big")
    termios.tcsetattr(descriptor, termios.TCSANOW, modes)


@contextmanager
def _raw(descriptor: int) -> Iterator[Any]:
    """Keys as they are pressed; the terminal is as it was, which is given, however this ends."""
    import termios

    before = termios.tcgetattr(descriptor)
    try:
        _set_raw(descriptor, termios.TCSAFLUSH)
        yield before
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


@contextmanager
def _stopping(
    descriptor: int, before: Any, give: Callable[[], None], take: Callable[[], None]
) -> Iterator[None]:
    """Has a job that is stopped ``give`` the terminal back as it was ``before``, and ``take`` it to go on."""
    import termios

    def go_on(*_: object) -> None:
        with suppress(termios.error):  # in the background this stops it, and it goes on once more
            _set_raw(descriptor, termios.TCSANOW)
            take()

    def stop(number: int, _: FrameType | None) -> None:
        give()
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # which does nothing where nobody would have it go on
        signal.signal(number, stop)
        go_on()

    was = {number: signal.getsignal(number) for number in (signal.SIGTSTP, signal.SIGCONT)}
    if was[signal.SIGTSTP] is not signal.SIG_IGN:
        signal.signal(signal.SIGTSTP, stop)
        signal.signal(signal.SIGCONT, go_on)
    try:
        yield
    finally:
        for number, handler in was.items():
            signal.signal(number, handler)


def _ask(source: int, target: int) -> bytes:
    os.write(target, _ASK)
    answer, end = b"", time.monotonic() + _ANSWER_SECONDS
    while not _ANSWERED.search(answer) and time.monotonic() < end:
        answer += _read(source, end - time.monotonic())
    return answer


def play(game: Game, inputs: Inputs, rate: float) -> None:
    """Play until Ctrl-C or Q in a terminal that `check_terminal` found well; closes the game."""
    source, seen = sys.stdin.fileno(), sys.stdout.fileno()
    with _raw(source) as before, _never_waiting(seen) as target:
        abilities = Abilities.read(_ask(source, seen), os.environ)
        player = _Player(game, inputs, rate, abilities, target)
        try:
            player.take(seen)
            with _stopping(source, before, player.give, partial(player.take, seen)):
                player.run(source)
        finally:
            player.give()


class _Player:
    """Keys to inputs and commands, updates to the screen."""

    def __init__(self, game: Game, inputs: Inputs, rate: float, abilities: Abilities, target: int) -> None:
        self._abilities = abilities
        self._fit()
        self._game, self._inputs, self._target = game, inputs, target
        self._is_seen, self._held = False, Held()
        self._writing = threading.RLock()  # a signal may come while it is held
        self._stage = Stage(game, inputs, self._show, self._say, rate)
        self._stage.is_watched = True
        self._game_loop = GameLoop([self._stage])

    def run(self, source: int) -> None:
        """Until the player has had enough."""
        begun = b""
        self._stage.post(lambda: self._stage.look(self._game.reset(self._game.prompts[0])))
        self._game_loop.start()
        try:
            while True:
                now, typed = time.monotonic(), _read(source, _POLL_SECONDS)
                is_escape = not typed and begun == b"\x1b"  # the key: of a sequence the rest would be here
                end = None if is_escape else _BEGUN.search(begun + typed)
                typed, begun = begun + typed, end[0] if end else b""
                for press in presses(typed.removesuffix(begun)):
                    self._held.take(press, now)
                    if self._command(press):
                        return
                self._inputs.update(self._held.at(now), stamp=now)
                if self._inputs.has_changed:
                    self._stage.wake()
        finally:
            self._is_seen = False
            self._game_loop.close()

    def take(self, seen: int) -> None:
        """Draw from here on, all of it anew, on the terminal that is ``seen``."""
        before = _AS_BEFORE if self._is_seen else b""
        with self._writing:
            os.write(seen, _ENTER + (before + _TELL_RELEASES if self._abilities.releases else b""))
            self._fit()
        self._is_seen, self._held = True, Held()  # whoever let go of a key meanwhile told somebody else
        self._post(self._look)

    def give(self) -> None:
        """Draw no more; the terminal is as it was."""
        self._is_seen = False
        with self._writing:
            _leave(self._target, (_AS_BEFORE if self._abilities.releases else b"") + _LEAVE)

    def _look(self) -> None:
        if self._game.known:
            self._stage.look(self._game.look())

    def _command(self, press: Press) -> bool:
        """Do what keys mean that the world has no use for; True: the player leaves."""
        if press.code in self._inputs.controls.keys or press.kind == "up":
            return False
        if press.code == STOP:
            signal.raise_signal(signal.SIGTSTP)
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
        with self._writing, suppress(OSError):  # nobody looks any more, which reading keys finds too
            while data and self._is_seen:
                if select.select([], [self._target], [], _POLL_SECONDS)[1]:
                    data = data[os.write(self._target, data) :]
