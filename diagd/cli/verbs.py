"""The verbs of the command line: which there are, what they are told, and how they end."""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from types import FrameType
from typing import Any, Final

from diagd.bundle.files import FULL
from diagd.cli.options import Verb, add_options, explain_stray, read_options
from diagd.cli.terminal import streams, visible
from diagd.errors import DependencyError, DiagdError, UsageError, unknown
from diagd.version import __version__

VERBS = {
    "export": "a checkpoint to a bundle of ONNX graphs",
    "build": "a step graph to a TensorRT engine",
    "generate": "frames from a bundle, a prompt and actions",
    "encode": "a video to tokens, and what its tokenizer loses",
    "decode": "tokens to a video",
    "play": "a living world in the browser or the terminal",
    "web": "a folder that plays a bundle in any browser",
    "serve": "worlds for many players, on one machine or a cluster, or for the clients of a release",
    "models": "what can be exported",
    "calibrate": "quantised step graphs for a bundle, accepted by a quality gate",
    "align": "fine-tune a bundle or checkpoint to diagonal decoding",
    "prefer": "tune a bundle to the better of its own rollouts, if that makes it better",
    "doctor": "is this machine ready, and what to do where it is not",
    "inspect": "what a bundle or an ONNX file holds, and what its schedule does",
    "plan": "memory and speed of a model on a device, before anything is done",
    "verify": "an engine against a plain FP32 reference, cell by cell",
    "profile": "where time goes: latency by stage, frames a second, distance from the machine's limits",
}
"""Verbs and what they do; each is a module of this package whose ``VERB`` it is."""

WORLD_VERBS = {
    "eval": "the quality of a world model under several schedules",
    "world": "record a world and train a model of it",
}
"""Verbs of the package beside this one; any package may add some as entry points of `GROUP`."""

GROUP = "diagd.verbs"

Verbs = Mapping[str, Verb[Any]]
"""Tasks of a verb that has several."""


def run(given: Sequence[str]) -> int:
    """Run the verb that ``given`` starts with and return its exit code."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it cannot keep its list of fonts
    with streams() as (out, errors), _stoppable():
        try:
            verb, args = _parse(list(given))
            code = _run(verb, args)
        except DependencyError as error:
            errors.write(f"error: {error}\n")
            return error.exit_code
        except KeyboardInterrupt as error:
            errors.write("interrupted\n")
            return 128 + (error.signal if isinstance(error, Stopped) else signal.SIGINT)
        out.flush()
        if out.is_full and out.lost is not None:
            errors.write(f"error: stdout: {out.lost.strerror}; what was printed is not complete\n")
            if verb.prints or getattr(args, "json", False):
                return code or UsageError.exit_code
    return code


class Stopped(KeyboardInterrupt):
    """Another signal that ends a process; the verb cleans up as it does for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let the signals of a closed terminal and of service managers end a verb as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        names = []  # nobody else may
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    ours = {number: handler for number, handler in before.items() if handler is signal.SIG_DFL}
    try:
        for number in ours:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _parse(given: list[str]) -> tuple[Verb[Any], argparse.Namespace]:
    """The verb in ``given`` and its options.

    Raises:
        DependencyError: the verb is of a package that is not installed.
    """
    parser = argparse.ArgumentParser(
        prog="diagd",
        description="Real-time frames from autoregressive video world models by diagonal decoding.",
        epilog="diagd VERB --help explains a verb.",
    )
    parser.add_argument("--version", action="version", version=f"diagd {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    added = {point.name: f"a verb of {point.module}" for point in entry_points(group=GROUP)}
    parsers = {name: _add(verbs, name, summary) for name, summary in (added | VERBS | WORLD_VERBS).items()}
    chosen = next((word for word in given if not word.startswith("-")), None)
    if chosen not in parsers:
        if chosen is not None:
            parser.error(str(unknown("verb", chosen, parsers)))
        parser.parse_args(given)  # explains, and leaves
    found = _find(str(chosen))  # the options of the others are not needed, and may import
    own = parsers[str(chosen)]
    if isinstance(found, Verb):
        _describe(own, found)
        args, strays = parser.parse_known_args(given)
        verb = found
    else:
        tasks = own.add_subparsers(dest="task", metavar="TASK", required=True)
        named = {name: _add(tasks, name, task.summary) for name, task in found.items()}
        for name, task in found.items():
            _describe(named[name], task)
        args, strays = parser.parse_known_args(given)
        own, verb = named[args.task], found[args.task]
    if strays:
        own.error(explain_stray(verb.options, strays[0]))
    return verb, args


def _add(verbs: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser


def _describe(parser: argparse.ArgumentParser, verb: Verb[Any]) -> None:
    parser.epilog = verb.examples
    add_options(parser, verb.options)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _find(verb: str) -> Verb[Any] | Verbs:
    if verb in VERBS:
        own: Verb[Any] = importlib.import_module(f"diagd.cli.{verb}").VERB
        return own
    for point in entry_points(group=GROUP, name=verb):
        added: Verb[Any] | Verbs = point.load().VERB
        return added
    raise DependencyError(
        f"`diagd {verb}` is a verb of diagd-worlds, which is not installed; "
        "run, in a clone of the repository: pip install ./worlds"
    )


def _run(verb: Verb[Any], args: argparse.Namespace) -> int:
    try:
        return verb.run(read_options(verb.options, args)) or 0
    except Exception as error:  # the user gets one line; --debug shows the rest
        if isinstance(error.__cause__, KeyboardInterrupt):  # of a module of C++ that was imported
            raise error.__cause__ from None
        if args.debug:
            traceback.print_exc()
        message, code = _explained(error)
        sys.stderr.write(visible(" ".join(line.strip() for line in message.split("\n"))) + "\n")
        return code


_HELD: Final = (5, 32, 33)
"""Errors of Windows for what somebody has open: ERROR_ACCESS_DENIED, _SHARING_VIOLATION, _LOCK_VIOLATION."""


def _explained(error: Exception) -> tuple[str, int]:
    """One line for an error, and the exit code."""
    if isinstance(error, DiagdError):
        return f"error: {error}", error.exit_code
    if isinstance(error, OSError):
        full = error.errno in FULL
        where = f"{error.filename}: " if error.filename else "a file cannot be written: " if full else ""
        remedy = "free some space or choose another place" if full else "check the path and its rights"
        if getattr(error, "winerror", None) in _HELD:
            remedy += ", and that no other program has it open"
        if "temporary directory" in str(error):
            remedy = "set TMPDIR to a folder that can be written"
        return f"error: {where}{error.strerror or error}; {remedy}", UsageError.exit_code
    if isinstance(error, MemoryError):
        message = "error: there is not enough memory; close other programs, or ask for less at once"
        return message, UsageError.exit_code
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "error: no more threads may be started here; raise the limit (ulimit -u, or of pids)", 2
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames and str(frames[-1].f_globals.get("__name__")).startswith("onnxruntime."):  # it has no class
        message = f"error: ONNX Runtime cannot run a graph as the manifest describes it ({error})"
        return f"{message}; they are of different versions: export the bundle again", UsageError.exit_code
    return _unforeseen(error)


def _unforeseen(error: Exception) -> tuple[str, int]:
    """It may be for packages that are not those that diagd needs."""
    from diagd.profiling.doctor import PROBLEM, check_packages

    told, checks = f"{type(error).__name__}: {error}", check_packages()
    unfit = "; ".join(f"{one.name} {one.found}, run: {one.fix}" for one in checks if one.status == PROBLEM)
    if unfit:
        return f"error: {told}; packages are not those that diagd needs: {unfit}", UsageError.exit_code
    return f"internal error: {told}; run again with --debug and report it", 1
