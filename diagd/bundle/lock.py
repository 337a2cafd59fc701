"""Writers of one place take turns."""

from __future__ import annotations

import errno
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_LOG = logging.getLogger(__name__)
_HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_POLL_SECONDS = 0.1
_FAR = 1 << 30
"""Windows locks bytes, and keeps others from reading them: one behind the text."""


@contextmanager
def turn(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Wait until no other process writes ``path``, and keep others waiting meanwhile.

    Yields False where another one does and ``wait`` is off.

    The lock is the system's, on a hidden file beside ``path``: it ends with the process that holds it, holds
    between containers, and between machines where the network disk has locks. Where there are none the caller
    goes on at once. The file says who holds it, which is logged by those who wait.
    """
    name = path.with_name(f".{path.name}.lock")
    file, taken = None, True
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(name, path, wait)
        taken = file is not None
    except OSError as error:
        _LOG.debug("no lock on %s: %s", path, error)
    try:
        yield taken
    finally:
        if file is not None:
            with file, suppress(OSError):
                if sys.platform != "win32" and _is_at(file, name):
                    name.unlink(missing_ok=True)  # locked: whoever opened it before sees that it is gone
                _unlock(file)
            if sys.platform == "win32":
                with suppress(OSError):  # it removes no file that somebody has open, who waits for it
                    name.unlink()


def _acquire(name: Path, path: Path, wait: bool) -> BinaryIO | None:
    warned = False
    while True:
        with ExitStack() as opened:
            file = opened.enter_context(name.open("a+b", buffering=0))
            if _lock(file):
                if _is_at(file, name):
                    file.truncate(0)
                    file.write(_holder().encode(errors="replace"))
                    opened.pop_all()
                    return file
            elif not wait:
                return None
            elif not warned:
                warned = True
                file.seek(0)
                holder = file.read(500).decode(errors="replace") or "another diagd"
                _LOG.warning("waiting for %s, which writes %s", holder, path)
        time.sleep(_POLL_SECONDS)


def _is_at(file: BinaryIO, name: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), name.stat())
    except FileNotFoundError:
        return False


def _holder() -> str:
    program = Path(sys.argv[0] if sys.argv else "diagd")
    name = program.parent.name if program.name == "__main__.py" else program.name
    verb = " ".join([name, *sys.argv[1:2]])
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return f"{verb} (process {os.getpid()} on {platform.node()}, since {since})"


def _lock(file: BinaryIO) -> bool:
    try:
        _ask_lock(file)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True


if sys.platform == "win32":
    import msvcrt

    def _ask_lock(file: BinaryIO) -> None:
        file.seek(_FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

    def _unlock(file: BinaryIO) -> None:
        file.seek(_FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    try:
        import fcntl
    except ImportError:  # a system without: its callers go on without locks
        fcntl = None  # type: ignore[assignment]

    def _ask_lock(file: BinaryIO) -> None:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no locks")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
