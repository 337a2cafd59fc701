"""From a bundle to a game."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from diagd.bundle import PROMPTS_NAME, Bundle
from diagd.bundle.cache import cache_directory
from diagd.engines.engine import Float, Int
from diagd.errors import UsageError
from diagd.options import File, checked
from diagd.play.game import Game
from diagd.play.pictures import View
from diagd.play.record import Line, read_record
from diagd.runtime.clip import EPISODE, read_prompt, read_recording, read_tokens
from diagd.runtime.group import Group
from diagd.runtime.options import SessionOptions
from diagd.runtime.pictures import files_in
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.text import check_text

SHIPPED: Final = Path(__file__).parents[1] / "models" / "crafter-3m" / "ready"
"""The world that is played without a bundle; `worlds.ship` makes it."""

_PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4", ".npy")
MAX_PROMPTS: Final = 24
_LOG = logging.getLogger(__name__)


@checked
class GameOptions:
    """What a game runs on.

    Without ``prompts`` worlds start from those of the bundle. ``text`` is float32 [n, width], embeddings for
    models that attend to one; ``record`` the file of the record, None keeping none.
    """

    prompts: tuple[File, ...] = ()
    session: SessionOptions = field(default_factory=SessionOptions)
    text: Float | None = None
    record: File | None = None


def open_game(path: Path, options: GameOptions) -> Game:
    """Open a bundle to be played.

    Raises:
        BundleError: it is missing, damaged or altered.
        UsageError: it has no tokenizer, or an option or a prompt does not fit it.
    """
    return open_games(path, options, 1)[1][0]


def open_games(path: Path, options: GameOptions, sessions: int) -> tuple[Group, list[Game]]:
    """Open a bundle to be played by many, in the passes of one engine, which the group closes.

    Only a game alone is recorded in ``options.record``.

    Raises:
        DiagdError: as `open_game`.
    """
    bundle = Bundle.open(path)
    check_text(bundle.manifest, options.text)
    chosen = options.session.in_time(bundle, sessions)
    bundle = bundle.at_precision(chosen.precision)
    codec = chosen.pixels(bundle)
    prompts = read_prompts(bundle, codec, options.prompts)
    group = chosen.open_group(bundle, sessions)
    try:
        for prompt in prompts:
            group.sessions[0].stream.check_prompt(prompt)
    except UsageError:
        group.close()
        raise
    record = options.record if sessions == 1 else None
    games = [Game(bundle, one, View(codec), prompts, record, options.text) for one in group.sessions]
    return group, games


def read_prompts(bundle: Bundle, codec: PixelCodec, files: Sequence[Path] = ()) -> list[Int]:
    """Token frames int32 [P, rows, columns] of files, else of the bundle's prompts, else an empty picture.

    Raises:
        UsageError: a file is none, or does not fit the model.
    """
    folder = bundle.file(PROMPTS_NAME)
    if not files and folder.is_dir():
        files = files_in(folder, _PICTURES)[:MAX_PROMPTS]
    if files:
        return [_read(file, bundle, codec) for file in files]
    return [bundle.manifest.cell_ranges[None, ..., 0].copy()]  # the lowest legal token everywhere


def open_replay(path: Path, record: Path, options: GameOptions) -> tuple[Game, list[tuple[int, Line]]]:
    """A game as a record was made by, where the options do not say otherwise, and the record's lines.

    Raises:
        DiagdError: the record is none, or the bundle cannot be played.
    """
    header, lines = read_record(record)
    session = options.session
    session = replace(
        session,
        precision=session.precision or header.precision,
        window=session.window or header.window,
        backend=session.backend or header.backend,
    )
    game = open_game(path, replace(options, session=session))
    if game.bundle.digest != header.bundle:
        _LOG.warning("%s is of another bundle (%s): its frames may differ", record, header.name)
    return game, lines


def new_record(name: str) -> Path | None:
    """A file for the record of a game that begins now, in the user's cache; None, and a word, without one."""
    folder = cache_directory()
    if folder is None:
        return None
    played = folder / "played"
    try:
        played.mkdir(parents=True, exist_ok=True)
        if not os.access(played, os.W_OK):
            raise PermissionError(f"{played} cannot be written")
    except OSError as error:
        _LOG.warning("what is played is not recorded, --record FILE does: %s", error)
        return None
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
    return played / f"{name}-{stamp}.ndjson"


def _read(file: Path, bundle: Bundle, codec: PixelCodec) -> Int:
    if file.suffix.lower() == ".npy":
        return read_tokens(file, bundle.manifest)
    if not file.is_file():
        raise UsageError(f"no such prompt: {file}; give a picture, a video, an episode or .npy tokens")
    if file.suffix.lower() == EPISODE:
        return read_recording(file, bundle.manifest, codec, 1, resize=True).tokens
    return read_prompt(file, codec, frames=1, resize=True)
