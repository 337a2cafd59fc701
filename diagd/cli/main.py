"""Where ``diagd`` and its aliases start: what takes time is imported when Ctrl-C is listened for."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``diagd VERB ...`` and return its exit code, whoever listens to what it says."""
    try:
        from diagd.cli.verbs import run

        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 128 + signal.SIGINT


def _alias(verb: str) -> Callable[[], int]:
    return lambda: main([verb, *sys.argv[1:]])


export, build, calibrate = _alias("export"), _alias("build"), _alias("calibrate")
generate, play, profile = _alias("generate"), _alias("play"), _alias("profile")
"""``diagd-export`` and so on: console scripts of the common verbs."""
