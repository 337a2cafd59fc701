"""What was played, as lines of JSON, and how it is played again, to the token.

The first line says which bundle was played. Then, in the order in which they happened: ``start`` (prompt
tokens and their actions), ``settings``, ``frame`` (its number, its action's ids, a digest of its tokens),
``ahead`` (actions of frames that had begun when the run ended), ``rewind``, ``branch``, ``visit``, ``audit``.
"""

from __future__ import annotations

import io
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Final, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from diagd.bundle import Bundle, Manifest
from diagd.bundle.files import read_text
from diagd.engines.backend import CPU
from diagd.engines.engine import Int
from diagd.errors import DiagdError, QualityError, UsageError, fault
from diagd.options import Frozen
from diagd.play.controls import Taken
from diagd.runtime.decoders import Decoder
from diagd.runtime.options import parse_decoder
from diagd.runtime.sampling import SAMPLER, SamplingSettings

if TYPE_CHECKING:
    from diagd.play.game import Game, Shown

FORMAT: Final = "diagd play 1"
MAX_BYTES: Final = 256 << 20
"""A record stops here; some four million frames."""

_LOG = logging.getLogger(__name__)

Id = Annotated[int, Field(ge=0, lt=1 << 31)]


class PlaySettings(Frozen):
    """Decoder, sampler and seed of the frames to come, which a player can change while a world runs.

    Attributes:
        decoder: as ``parse_decoder`` reads it, such as ``k=1 serial`` or ``jacobi``.
    """

    decoder: Annotated[str, Field(max_length=80)]
    temperature: Annotated[float, Field(ge=0, le=100)]
    top_k: Annotated[int, Field(ge=0, le=1 << 24)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    seed: Annotated[int, Field(ge=0, lt=1 << 53)] = 0

    @classmethod
    def of(cls, manifest: Manifest) -> PlaySettings:
        """A bundle's own."""
        rules = manifest.sampling.model_dump(include={"temperature", "top_k", "top_p"})
        return cls(decoder=manifest.spelling, **rules)

    @property
    def sampling(self) -> SamplingSettings:
        """How tokens are drawn; UsageError: a value cannot be drawn with."""
        return SamplingSettings(self.temperature, self.top_k, self.top_p)

    def open(self, manifest: Manifest) -> Decoder:
        """The decoder, new; ScheduleError: it is no decoder, or its lags cannot be decoded."""
        return parse_decoder(self.decoder, manifest)


class Header(Frozen):
    """First line: ``bundle`` is the digest of its manifest."""

    format: Literal["diagd play 1"]
    bundle: str
    name: str
    precision: str
    window: int
    backend: str = CPU
    sampler: str
    diagd: str


class Start(Frozen):
    """A world began with prompt tokens [P, rows, columns] and their action ids [P, n]."""

    start: list[list[list[Id]]]
    actions: list[list[Id]] | None


class Settings(Frozen):
    """Frames from here on are decoded so."""

    settings: PlaySettings


class Played(Frozen):
    """A frame, the ids that led to it, and the digest of its tokens."""

    frame: int
    action: list[Id] | None
    tokens: str


class Ahead(Frozen):
    """Actions of frames that had begun, and were given up."""

    ahead: list[list[Id] | None]


class Flying(Ahead):
    """Likewise, of frames that are in flight now; told, but not written."""


class Rewind(Frozen):
    """Frames that were taken back."""

    rewind: Annotated[int, Field(ge=1)]


class Branch(Frozen):
    """A place was marked with a number."""

    branch: int


class Visit(Frozen):
    """A marked place was gone back to."""

    visit: int


class Audited(Frozen):
    """Frames were compared with next-token prediction: rows behind them were built again, and round anew."""

    audit: Annotated[int, Field(ge=1)]


Line = Start | Settings | Played | Ahead | Rewind | Branch | Visit | Audited
_LINE: Final[TypeAdapter[Line]] = TypeAdapter(Line)


def digest(tokens: Int) -> str:
    """Eight hexadecimal digits of a frame's tokens [rows, columns]."""
    return f"{zlib.crc32(np.ascontiguousarray(tokens, '<i4').tobytes()):08x}"


def header(bundle: Bundle, precision: str, window: int, backend: str = CPU) -> Header:
    """First line of a bundle's record."""
    from diagd.version import __version__

    return Header(
        format="diagd play 1",
        bundle=bundle.digest,
        name=bundle.manifest.name,
        precision=precision,
        window=window,
        backend=backend,
        sampler=SAMPLER,
        diagd=__version__,
    )


class Record:
    """Writes lines as they happen, to a file or, without one, nowhere; in ``path`` while it is written.

    Attributes:
        heard: is given each line too, and with a frame what is in flight behind it.
    """

    def __init__(self, path: Path | None, first: Header) -> None:
        self.path = path
        self.heard: Callable[..., None] = lambda *lines: None
        self._file: IO[str] | None = None
        self._bytes = self._told = 0
        if path is not None:
            try:
                self._file = path.open("x", encoding="utf-8", newline="\n")
            except FileExistsError:
                raise UsageError(
                    f"{path} is there already and records are not written over; give --record another name"
                ) from None
            except FileNotFoundError:
                raise UsageError(
                    f"--record {path}: the directory {path.parent} does not exist; make it first"
                ) from None
            self.add(first)

    def add(self, line: Line | Header, *behind: Flying) -> None:
        """Write a line; what is in flight behind it is told with it, not written."""
        if not isinstance(line, Header):
            self.heard(line, *behind)
            self._told += 1
        if self._file is None:
            return
        text = line.model_dump_json() + "\n"
        self._bytes += len(text)
        if self._bytes > MAX_BYTES:
            self.close()
            return
        try:
            self._file.write(text)
            if not isinstance(line, Played) or not line.frame % 32:
                self._file.flush()
        except OSError:
            self.close()

    def read(self) -> bytes:
        """All that was written so far; UsageError: the file is gone."""
        try:
            if self._file is not None:
                self._file.flush()
            return b"" if self.path is None else self.path.read_bytes()
        except OSError as error:
            raise UsageError(f"the record cannot be read: {error.strerror or error}") from None

    def close(self) -> None:
        """Write no more; the game goes on where what was written does not reach the disk.

        The record of a game that never began is removed.
        """
        if self._file is None or self.path is None:
            return
        try:
            self._file.close()
            if not self._told:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("the record %s ends early: %s", self.path, error.strerror or error)
        self._file = None


def is_record(path: Path) -> bool:
    """Whether a file begins as a record does."""
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline(1 << 16))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and str(first.get("format", "")).startswith("diagd play")


def read_record(path: Path) -> tuple[Header, list[tuple[int, Line]]]:
    """The first line and the others with their numbers; a last line that was cut off is left out.

    Raises:
        UsageError: it is no record, or a line is damaged.
    """
    lines = list(enumerate(io.StringIO(read_text(path, "the record")), start=1))
    try:
        first = Header.model_validate_json(lines[0][1])
    except (IndexError, ValidationError):
        raise UsageError(f"{path} is no record of `diagd-play`: its first line has no '{FORMAT}'") from None
    parsed: list[tuple[int, Line]] = []
    for number, text in lines[1:]:
        try:
            parsed.append((number, _LINE.validate_json(text)))
        except ValidationError as error:
            if number == lines[-1][0] and not text.endswith("\n"):
                break
            raise UsageError(f"{path}, line {number}: {fault(error)} ({text.strip()[:60]})") from None
    if parsed and not isinstance(parsed[0][1], Start):
        raise UsageError(f"{path}, line {parsed[0][0]}: expected a start, which a world begins with")
    if first.sampler != SAMPLER:
        raise UsageError(
            f"{path} was drawn by the sampler {first.sampler!r}, this diagd's is {SAMPLER!r}: it gives other "
            f"tokens; play it with diagd {first.diagd}"
        )
    return first, parsed


def replay(game: Game, lines: Sequence[tuple[int, Line]], strict: bool = True) -> Iterator[Shown]:
    """Do again what a record says, and give every frame that was shown.

    With ``strict``, a frame with other tokens than those recorded is an error.

    Raises:
        QualityError: a frame differs; the message has its number and its line.
        UsageError: the record does not fit the model.
    """
    ids: Iterator[Taken] | None = None  # of the run that is under way
    for index, (number, line) in enumerate(lines):
        if not isinstance(line, Played):
            ids = None
            with _at(number):
                _replay_command(game, line)
            continue
        ids = ids or _led(lines[index:])
        with _at(number):
            shown = game.advance(partial(next, ids, None))
            if shown is None or shown.frame.index != line.frame:
                raise UsageError(f"frame {line.frame} does not follow what is before it")
        if strict and digest(shown.frame.tokens) != line.tokens:
            raise QualityError(
                f"line {number}: frame {line.frame} is the first that differs from the record; another "
                "engine, precision or version rounds differently"
            )
        yield shown


@contextmanager
def _at(number: int) -> Iterator[None]:
    """Have errors say at which line of a record they came."""
    try:
        yield
    except DiagdError as error:
        raise type(error)(f"line {number}: {error}") from error


def _led(lines: Iterable[tuple[int, Line]]) -> Iterator[Taken]:
    """Actions of the frames that begin until a run ends."""
    for _, line in lines:
        if not isinstance(line, Played | Ahead):
            return
        for action in line.ahead if isinstance(line, Ahead) else [line.action]:
            yield Taken(None if action is None else np.array(action, np.int32), {})
        if isinstance(line, Ahead):
            return


def _replay_command(game: Game, line: Line) -> None:
    if isinstance(line, Start):
        try:
            actions = None if line.actions is None else np.array(line.actions, np.int32)
            prompt = np.array(line.start, np.int32)
        except ValueError:
            raise UsageError("it is no prompt of token frames of one size") from None
        game.reset(prompt, actions)
    elif isinstance(line, Settings):
        game.choose(line.settings)
    elif isinstance(line, Ahead):  # which ends a run
        game.stop()
    elif isinstance(line, Rewind):
        game.rewind(line.rewind)
    elif isinstance(line, Branch):
        game.branch()
    elif isinstance(line, Visit):
        game.visit(line.visit)
    elif isinstance(line, Audited):
        game.audit(line.audit)
