"""What a page may say, and nothing else: every message is checked against its model."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from diagd.errors import UsageError
from diagd.play.controls import Code
from diagd.play.record import PlaySettings
from diagd.play.stage import Mode

VERSION: Final = 1
MAX_TEXT: Final = 4096
"""Bytes of a message; pictures apart, which have a size of their own."""

Whole = Annotated[int, Field(ge=0, lt=1 << 53)]
Number = Annotated[float, Field(ge=-1e5, le=1e5, allow_inf_nan=False)]
Time = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Hello(_Message):
    """First of all: the token of the address, and the ticket of a seat that was held before."""

    type: Literal["hello"]
    version: Whole
    token: Annotated[str, Field(max_length=128)]
    ticket: Annotated[str, Field(max_length=128)] = ""


class Input(_Message):
    """All that is held, mouse pixels since the last one, and when (the page's clock, milliseconds)."""

    type: Literal["input"]
    t: Time
    keys: Annotated[tuple[Code, ...], Field(max_length=32, strict=False)] = ()
    dx: Number = 0.0
    dy: Number = 0.0
    axes: Annotated[tuple[Annotated[float, Field(ge=-1, le=1)], ...], Field(max_length=8, strict=False)] = ()

    @property
    def is_still(self) -> bool:
        """Whether nothing is held and nothing moved: what a page says whose player is away."""
        return not (self.keys or self.dx or self.dy or any(self.axes))


class Ack(_Message):
    """An update was drawn, and all before it."""

    type: Literal["ack"]
    id: Whole


class Reset(_Message):
    """Begin anew, from a prompt of the gallery or the last one."""

    type: Literal["reset"]
    prompt: Annotated[int, Field(ge=0, lt=1 << 16)] | None = None


class Rewind(_Message):
    """Take frames back."""

    type: Literal["rewind"]
    frames: Annotated[int, Field(ge=1, le=100_000)]


class Visit(_Message):
    """Go back to a mark."""

    type: Literal["visit"]
    number: Whole


class Choose(_Message):
    """Decode by other settings."""

    type: Literal["choose"]
    settings: Annotated[PlaySettings, Field(strict=False)]


class Playback(_Message):
    """Another mode, another rate."""

    type: Literal["pace"]
    mode: Mode | None = None
    rate: Annotated[float, Field(ge=0.1, le=240)] | None = None


class Autopilot(_Message):
    """Let the model play until a key is pressed, or stop it."""

    type: Literal["autopilot"]
    on: bool


class Plain(_Message):
    """Mark this place, send the record or the last frames, or compare these with next-token prediction."""

    type: Literal["branch", "save", "film", "audit"]


Command = Reset | Rewind | Visit | Choose | Playback | Autopilot | Plain
Message = Hello | Input | Ack | Command
_MESSAGE: Final[TypeAdapter[Message]] = TypeAdapter(Annotated[Message, Field(discriminator="type")])

_PATH: Final = re.compile(r"(?:\b[A-Za-z]:)?(?:[\\/][^\s\\/:;,'\"()]+){2,}")


def parse(text: str) -> Message:
    """A message; UsageError, which says where it is wrong and nothing of its content, where it is none."""
    if len(text) > MAX_TEXT or len(text.encode(errors="replace")) > MAX_TEXT:
        raise UsageError(f"a message has more than {MAX_TEXT} bytes")
    try:
        return _MESSAGE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:80]
        raise UsageError(f"a message is wrong at '{where}': {first['type']}") from None


def without_paths(text: str) -> str:
    """An error as a player may see it: what it says of this machine's files is left out."""
    return _PATH.sub("(a file)", text)
