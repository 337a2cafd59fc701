"""What a terminal sends when keys are pressed, as key codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

HELD_SECONDS: Final = 0.25
"""A key of a terminal that tells no releases is held for so long after it was last repeated."""

QUIT: Final = "Quit"
_CTRL: Final = 4  # bit of the modifiers in the protocol, one of which is added
_ARROWS: Final = {"A": "ArrowUp", "B": "ArrowDown", "C": "ArrowRight", "D": "ArrowLeft"}
_NAMED: Final = {
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
    if number in _NAMED:
        return _NAMED[number]
    if number in (3, 4):
        return QUIT
    if number == 8:
        return "Backspace"
    letter = chr(number) if number < 128 else ""
    if letter.isalpha():
        return f"Key{letter.upper()}"
    return f"Digit{letter}" if letter.isdigit() else None


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
