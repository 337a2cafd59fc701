"""Paths on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path


def path(text: str) -> Path:
    """Type of an option that takes a path; an empty one is mostly a variable that was never set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty (a variable that is not set?); give a path")
    return Path(text)
