"""The command line: one entry point with verbs, and an alias for the common ones."""

from __future__ import annotations

import argparse
import errno
import importlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from types import FrameType, ModuleType

from diagd.cli.terminal import streams
from diagd.errors import DependencyError, DiagdError, UsageError
from diagd.version import __version__

VERBS = {
    "export": "a checkpoint to a bundle of ONNX graphs",
    "build": "a step graph to a TensorRT engine",
    "generate": "frames from a bundle, a prompt and actions",
    "models": "what can be exported",
    "calibrate": "quantised step graphs for a bundle, accepted by a quality gate",
    "align": "fine-tune a bundle or checkpoint to diagonal decoding",
    "doctor": "is this machine ready, and what to do where it is not",
    "inspect": "what a bundle or an ONNX file holds, and what its schedule does",
    "plan": "memory and speed of a model on a device, before anything is done",
    "verify": "an engine against a plain FP32 reference, cell by cell",
    "profile": "where time goes: latency by stage, frames a second, distance from the machine's limits",
}
"""Verbs and what they do; each is a module of this package with ``arguments(parser)`` and ``run(args)``."""

WORLD_VERBS = {
    "eval": "the quality of a world model under several schedules",
    "world": "record a world and train a model of it",
}
"""Verbs of the package beside this one; any package may add some as entry points of `GROUP`."""

GROUP = "diagd.verbs"

PRINTERS = ("models", "doctor", "inspect", "plan", "verify")
"""Verbs whose result is what they print."""

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``diagd VERB ...`` and return its exit code, whoever listens to what it says."""
    given = list(sys.argv[1:] if argv is None else argv)
    with streams() as (out, errors), _stoppable():
        try:
            module, args = _parse(given)
        except DependencyError as error:
            errors.write(f"error: {error}\n")
            return error.exit_code
        code = _run(module, args)
        out.flush()
        if out.is_full and out.lost is not None:
            errors.write(f"error: stdout: {out.lost.strerror}; what was printed is not complete\n")
            if getattr(args, "json", False) or args.verb in PRINTERS:
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


def _parse(given: list[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The module of the verb in ``given`` and its options.

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
    parsers = {
        name: verbs.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for name, summary in (added | VERBS | WORLD_VERBS).items()
    }
    chosen = next((word for word in given if not word.startswith("-")), None)
    if chosen not in parsers:
        parser.parse_args(given)  # explains, and leaves
    module = _module(str(chosen))  # the options of the others are not needed, and may import
    module.arguments(parsers[str(chosen)])
    parsers[str(chosen)].add_argument("--debug", action="store_true", help="show the traceback of an error")
    return module, parser.parse_args(given)


def export() -> int:
    """``diagd-export``."""
    return main(["export", *sys.argv[1:]])


def calibrate() -> int:
    """``diagd-calibrate``."""
    return main(["calibrate", *sys.argv[1:]])


def build() -> int:
    """``diagd-build``."""
    return main(["build", *sys.argv[1:]])


def generate() -> int:
    """``diagd-generate``."""
    return main(["generate", *sys.argv[1:]])


def profile() -> int:
    """``diagd-profile``."""
    return main(["profile", *sys.argv[1:]])


def _module(verb: str) -> ModuleType:
    if verb in VERBS:
        return importlib.import_module(f"diagd.cli.{verb.replace('-', '_')}")
    for point in entry_points(group=GROUP, name=verb):
        module: ModuleType = point.load()
        return module
    raise DependencyError(
        f"`diagd {verb}` is a verb of diagd-worlds, which is not installed; "
        "run, in a clone of the repository: pip install ./worlds"
    )


def _run(module: ModuleType, args: argparse.Namespace) -> int:
    try:
        code: int = module.run(args)
    except DiagdError as error:
        if args.debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        if args.debug:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        remedy = (
            "free some space or choose another place"
            if error.errno in FULL
            else "check the path and its rights"
        )
        sys.stderr.write(f"error: {where}{error.strerror or error}; {remedy}\n")
        return UsageError.exit_code
    except KeyboardInterrupt as error:
        sys.stderr.write("interrupted\n")
        return 128 + (error.signal if isinstance(error, Stopped) else signal.SIGINT)
    except MemoryError:
        if args.debug:
            traceback.print_exc()
        sys.stderr.write("error: there is not enough memory; close other programs, or ask for less at once\n")
        return UsageError.exit_code
    except Exception as error:  # the user gets one line; --debug shows the rest
        if args.debug:
            traceback.print_exc()
        kind = type(error).__name__
        sys.stderr.write(f"internal error: {kind}: {error}; run again with --debug and report it\n")
        return 1
    return code
