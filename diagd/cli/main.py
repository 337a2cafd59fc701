"""The command line: one entry point with verbs, and an alias for the common ones."""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from diagd.errors import DiagdError, UsageError
from diagd.version import __version__

VERBS = {
    "export": "a checkpoint to a bundle of ONNX graphs",
    "build": "a step graph to a TensorRT engine",
    "generate": "frames from a bundle, a prompt and actions",
    "models": "what can be exported",
    "calibrate": "quantised step graphs for a bundle, accepted by a quality gate",
    "align": "fine-tune a bundle or checkpoint to diagonal decoding",
    "eval": "the quality of a world model under several schedules",
    "world": "record a world and train a model of it",
    "doctor": "is this machine ready, and what to do where it is not",
    "inspect": "what a bundle or an ONNX file holds, and what its schedule does",
    "plan": "memory and speed of a model on a device, before anything is done",
    "verify": "an engine against a plain FP32 reference, cell by cell",
    "profile": "where time goes: latency by stage, frames a second, distance from the machine's limits",
}
"""Verbs and what they do; each is a module of this package with ``arguments(parser)`` and ``run(args)``."""

INTERRUPTED = 130
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``diagd VERB ...`` and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="diagd",
        description="Real-time frames from autoregressive video world models by diagonal decoding.",
        epilog="diagd VERB --help explains a verb.",
    )
    parser.add_argument("--version", action="version", version=f"diagd {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    chosen = next((word for word in given if not word.startswith("-")), None)
    for name, summary in VERBS.items():
        verb = verbs.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:  # only this one needs its options, and they may import
            _module(name).arguments(verb)
            verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(given)
    return _run(_module(args.verb), args)


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
    return importlib.import_module(f"diagd.cli.{verb.replace('-', '_')}")


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
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except Exception as error:  # the user gets one line; --debug shows the rest
        if args.debug:
            traceback.print_exc()
        kind = type(error).__name__
        sys.stderr.write(f"internal error: {kind}: {error}; run again with --debug and report it\n")
        return 1
    return code
