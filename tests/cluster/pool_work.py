"""What workers do in tests: a module of its own, as their processes import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from diagd.errors import UsageError


def squares(folder: Path) -> Callable[[int], int]:
    """Gets ready, which is counted by files in the folder."""
    (folder / f"ready-{os.getpid()}").touch()
    return partial(square, folder)


def square(folder: Path, number: int) -> int:
    """Dies at 3 the first time, and at 13 always; refuses what is negative."""
    first = folder / f"{number}"
    if number < 0:
        raise UsageError(f"{number} is negative")
    if number == 13 or (number == 3 and not first.exists()):
        first.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def sizes(folder: Path) -> Callable[[bytes], int]:
    return partial(size, folder)


def size(folder: Path, item: bytes) -> int:
    """Dies of the first item, and of ones always."""
    if item.startswith(b"1") or not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return len(item)


class Absent:
    """What is there where it is sent from alone, as a module that a node lacks."""

    def __call__(self) -> Callable[[int], int]:
        return abs

    def __reduce__(self) -> tuple[Callable[[], Absent], tuple[()]]:
        return _absent, ()


def _absent() -> Absent:
    raise ModuleNotFoundError("No module named 'absent'")


def sleeps() -> Callable[[float], float]:
    """Take so many seconds, and give them."""

    def work(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    return work
