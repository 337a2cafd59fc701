"""``diagd play``: a living world in the browser or the terminal."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.util import find_spec
from math import inf

from rich.console import Console

from diagd.bundle import read_manifest
from diagd.bundle.targets import check_apart, check_distinct, file_target
from diagd.cli import terminal
from diagd.cli.generate import encode_text
from diagd.cli.options import Verb
from diagd.cli.serve import warn
from diagd.errors import UsageError
from diagd.options import File, Flag, checked, flag, positional, setting
from diagd.play.controls import Inputs, read_controls
from diagd.play.game import Game
from diagd.play.opening import SHIPPED, GameOptions, new_record, open_game, open_replay
from diagd.play.record import Played, replay
from diagd.play.server import Address, Limits
from diagd.play.service import Service, serve
from diagd.play.site import Public
from diagd.play.table import LocalFleet, Table
from diagd.progress import Progress
from diagd.runtime.options import SessionOptions, TextOptions
from diagd.runtime.video import SUFFIXES, VideoWriter

EXAMPLES = """examples:
  diagd-play crafter-3m.diagd --prompt first.png --fps 20 --video played.mp4
  diagd-play crafter-3m.diagd --terminal
  diagd-play crafter-3m.diagd --replay played.ndjson

What you do is recorded; --replay plays a record again and names the first frame that differs. Keys, security
and the protocol: docs/play.md.
"""


@checked
class PlayOptions:
    """What is played, and where."""

    bundle: File | None = positional("default: crafter-3m, which comes with diagd", None)
    prompt: tuple[File, ...] = flag(
        "picture, video, .npz episode or .npy tokens to start from (default: those of the bundle)",
        (),
        Flag(repeated=True),
    )
    fps: float | None = flag("frames a second (default: the model's)", None, ge=0.1, le=240)
    terminal: bool = flag("play in this terminal, not in a browser", False)
    replay: File | None = flag("play a record again, and check every frame", None)
    record: File | None = flag("where the record goes (default: the user's cache)", None)
    video: File | None = flag(".mp4 or .gif of all that is seen", None)
    host: str = flag("address to listen on", "127.0.0.1", min_length=1)
    port: int = flag("0 for any that is free", 8765, ge=0, le=65535)
    controls: File | None = setting("what keys do (default: controls.json of the bundle)", None)
    browser: bool = setting("open the page in a browser", True)
    public: Public = setting("addresses of a proxy, tunnel or container that lead here; prints the first", ())
    session: SessionOptions = SessionOptions()
    condition: TextOptions = TextOptions()


def run(options: PlayOptions) -> None:
    """Play until the player has had enough."""
    _check_video(options)
    place = options.bundle or SHIPPED
    manifest = read_manifest(place)
    text = options.condition.embeddings(manifest, encode_text)
    game_options = GameOptions(options.prompt, options.session, text)
    console = terminal.console()
    with ExitStack() as stack:
        if options.replay:
            game, lines = open_replay(place, options.replay, game_options)
            _video(stack, options, stack.enter_context(game))
            frames = sum(isinstance(line, Played) for _, line in lines)
            with Progress(console).count("replay", frames) as advance:
                for shown in replay(game, lines):
                    advance(1)
                    game.watch(shown.pictures)
            console.print(f"{frames} frames, all equal to the record to the token")
        else:
            if _is_in_terminal(options):
                _check_terminal()
            record = options.record or new_record(manifest.name)
            game = stack.enter_context(open_game(place, replace(game_options, record=record)))
            _video(stack, options, game)
            _play(console, options, game)
    if options.video is not None:
        console.print(f"video: {options.video}")


def _is_in_terminal(options: PlayOptions) -> bool:
    has_page = sys.platform == "win32" or find_spec("websockets") is not None
    return options.terminal or (not has_page and sys.stdout.isatty())


def _check_terminal() -> None:
    if sys.platform != "win32":
        from diagd.play.terminal import check_terminal

        check_terminal(os.environ)
    else:
        raise UsageError("--terminal needs a terminal of Linux, macOS or WSL; play in the browser instead")


def _check_video(options: PlayOptions) -> None:
    """Refuse a ``--video`` that would take the place of something else, before the game begins."""
    if options.video is not None:
        file_target(options.video, SUFFIXES, "--video")
        check_distinct({"--record": options.record, "--video": options.video})
        read = {"--replay": options.replay, "--record": options.record, "--prompt": None}
        for prompt in (None, *options.prompt):
            check_apart(options.video, read | {"--prompt": prompt}, "--video")


def _video(stack: ExitStack, options: PlayOptions, game: Game) -> None:
    """Have pictures written to ``--video``."""
    if options.video is not None:
        codec, rate = game.view.codec, options.fps or game.bundle.manifest.frames_per_second
        writer = VideoWriter(options.video, rate, codec.spec.size, codec.mark)
        game.watch = stack.enter_context(writer).write


def _play(console: Console, options: PlayOptions, game: Game) -> None:
    codec = game.bundle.manifest.actions
    inputs = Inputs(read_controls(game.bundle.path, codec, options.controls), codec)
    rate = options.fps or game.bundle.manifest.frames_per_second
    if sys.platform != "win32" and _is_in_terminal(options):
        from diagd.play.terminal import play

        with suppress(KeyboardInterrupt):  # how a player leaves
            play(game, inputs, rate)
    else:
        _serve(console, options, Table(game, inputs, rate))
    if game.record.path is not None:
        console.print(f"recorded: {game.record.path}")


def _serve(console: Console, options: PlayOptions, table: Table) -> None:
    address = Address(options.host, options.port, options.public)
    warn(console, address)

    def started(name: str, url: str) -> None:
        console.print(f"{name}: {url}\nCtrl-C ends it.")
        sys.stdout.flush()
        if options.browser and sys.stdout.isatty():
            import webbrowser

            opening = threading.Thread(target=webbrowser.open, args=(url,), daemon=True)
            opening.start()  # some browsers, as those of terminals, run until they are closed

    service = Service(1, options.fps, limits=Limits(inf, inf, drain=0))
    serve(table.game.bundle, LocalFleet([table]), service, address, started)


VERB = Verb(PlayOptions, run, EXAMPLES)
