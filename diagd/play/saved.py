"""What it takes to go on with a game elsewhere, or after the server died."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, Field, ValidationError

from diagd.bundle.files import atomic_file
from diagd.bundle.targets import folder_target
from diagd.errors import UsageError
from diagd.play.game import Game
from diagd.play.record import Flying, Line, Start, replay

_LOG = logging.getLogger(__name__)

EVERY: Final = 60
"""Frames between two snapshots."""
MARK: Final = "token"
KIND: Final = "diagd worlds"


class _Marked(BaseModel):
    """What the file `MARK` of a folder of worlds holds."""

    kind: Literal["diagd worlds"]
    token: str = Field(pattern="^[A-Za-z0-9_-]{16,128}$")


class _Head(BaseModel):
    """First line of a world that is kept."""

    bundle: str
    ticket: str = Field(min_length=1, max_length=128)


@dataclass
class SavedGame:
    """A snapshot of a game, and what of its record came since.

    Attributes:
        snapshot: None: the lines begin with the game.
        flying: what was in flight behind the last frame, which orders that overlap frames decode it among.
    """

    snapshot: bytes | None = None
    lines: list[Line] = field(default_factory=list)
    flying: Flying | None = None

    def add(self, line: Line) -> None:
        """One more; a world that began anew needs nothing of what was before."""
        if isinstance(line, Flying):
            self.flying = line
            return
        if isinstance(line, Start):
            self.snapshot, self.lines = None, []
        self.flying = None
        self.lines.append(line)

    def take(self, snapshot: bytes) -> None:
        """The game as it is now."""
        self.snapshot, self.lines, self.flying = snapshot, [], None

    def restore(self, game: Game) -> None:
        """Have a game go on from there, to the token.

        Raises:
            QualityError: its engine draws other tokens.
            UsageError: it is a game of another model.
        """
        heard, game.record.heard = game.record.heard, lambda line: None  # it was told when it happened
        try:
            self._restore(game)
        finally:
            game.record.heard = heard

    def _restore(self, game: Game) -> None:
        if self.snapshot is not None:
            game.restore(self.snapshot)
        lines = [*self.lines, *([self.flying] if self.flying else [])]
        for _ in replay(game, list(enumerate(lines, start=1))):
            pass


def saved_games_target(folder: Path) -> Path:
    """Where worlds can be kept.

    Raises:
        UsageError: the folder holds something else, or cannot be written.
    """
    return folder_target(folder, {MARK: KIND.encode()}, "worlds that diagd serve keeps", "--set state")


class SavedGames:
    """A folder of kept games, which another server finds when this one died: each with its player's ticket.

    Worlds of other bundles stay as they are.

    Args:
        folder: made where it is not there; for this user's eyes, as tickets and token let somebody in.
        bundle: digest of what is played.

    Attributes:
        token: that of the server before, so that the address of its page still holds; else a fresh one.

    Raises:
        UsageError: the folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, bundle: str) -> None:
        self._folder, self._bundle, self._writer = folder, bundle, ThreadPoolExecutor(1)
        saved_games_target(folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.token = self._token(folder / MARK)
        except OSError as error:
            raise UsageError(f"{folder} cannot hold worlds: {error.strerror or error}") from None

    def _token(self, path: Path) -> str:
        if path.exists():
            try:
                return _Marked.model_validate_json(path.read_bytes()).token
            except ValidationError:
                raise UsageError(
                    f"{path} is damaged; remove it, and the server gets another address"
                ) from None
        made = _Marked(kind=KIND, token=secrets.token_urlsafe(16))
        self._write(path, made.model_dump_json().encode())
        return made.token

    def put(self, number: int, ticket: str, snapshot: bytes) -> None:
        """Keep the world of a table; the disk is written in a thread of its own."""
        head = _Head(bundle=self._bundle, ticket=ticket).model_dump_json().encode()
        self._writer.submit(self._put, self._path(number), head + b"\n" + snapshot)

    def drop(self, number: int) -> None:
        """The world of a table is nobody's."""
        self._writer.submit(self._path(number).unlink, missing_ok=True)

    def close(self) -> None:
        """Write what is to be written."""
        self._writer.shutdown()

    def _put(self, path: Path, content: bytes) -> None:
        try:
            self._write(path, content)
        except OSError as error:  # the games go on
            _LOG.warning("a world is not kept: %s: %s", path, error.strerror or error)

    def find(self, tables: int) -> Iterator[tuple[int, str, bytes]]:
        """Number, ticket and snapshot of each world of this bundle that is kept."""
        for number in range(tables):
            path = self._path(number)
            try:
                head, _, snapshot = path.read_bytes().partition(b"\n")
                told = _Head.model_validate_json(head)
            except FileNotFoundError:
                continue
            except (OSError, ValidationError):
                _LOG.warning("%s is damaged: the world is not gone on with", path)
                continue
            if told.bundle == self._bundle:
                yield number, told.ticket, snapshot

    def _path(self, number: int) -> Path:
        return self._folder / f"world-{self._bundle[:12]}-{number}"

    def _write(self, path: Path, content: bytes) -> None:
        with atomic_file(path) as partial, partial.open("wb") as file:
            partial.chmod(0o600)
            file.write(content)
