"""What this machine keeps to be faster next time: never required, and never trusted without its digest.

Whatever is wrong with it (absent, unwritable, full, damaged, another user's, shared by machines that
start together), a caller gets nothing instead, one line says why, and the work goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagd.bundle import files
from diagd.bundle.lock import turn
from diagd.errors import DiagdError

ENTRY_NAME = "entry.json"
DEFAULT_LIMIT = 32 << 30
"""Most bytes that are kept, and a quarter of the disk at most; ``DIAGD_CACHE_LIMIT`` (GB) says otherwise."""

_SMALL = 1 << 20
_MOST_SMALL = 20_000
_IN_USE_SECONDS = 600.0
_ABANDONED_SECONDS = 7 * 86400.0
_TICK_SECONDS = 0.02
"""File times are no finer than this: a change within it may leave them as they were."""

_LOG = logging.getLogger(__name__)
_warned: set[str] = set()
_swept: set[Path] = set()


def cache_directory() -> Path | None:
    """Where the cache is: ``$DIAGD_CACHE``, or diagd in the user's cache; None where there is no such place.

    ``~/`` is the home where what set the variable left it as it is.
    Variables that are empty, and a relative ``XDG_CACHE_HOME`` or ``HOME``, are as good as not set.
    """
    if explicit := os.environ.get("DIAGD_CACHE"):
        home = _home() if explicit.startswith("~/") else None
        return (home / explicit[2:] if home else Path(explicit)).absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():
        return shared / "diagd"
    home = _home()
    return None if home is None else home / ".cache" / "diagd"


def limit_bytes(root: Path) -> int:
    """Most bytes that are kept in the cache."""
    with suppress(KeyError, ValueError, OverflowError):
        return int(float(os.environ["DIAGD_CACHE_LIMIT"]) * 1e9)
    there = next((folder for folder in (root, *root.parents) if folder.is_dir()), Path("/"))
    return min(DEFAULT_LIMIT, shutil.disk_usage(there).total // 4)


def read(kind: str, key: str) -> bytes | None:
    """Bytes that were kept under a key, or None."""
    try:
        if (root := cache_directory()) is None:
            return None
        file = root / kind / key
        content = file.read_bytes() if _is_ours(file) and file.is_file() else b""
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    body = content[size:]
    if len(content) < size or hashlib.sha256(body).digest() != content[:size]:
        return None
    _touch(file)
    return body


def write(kind: str, key: str, body: bytes) -> None:
    """Keep a few bytes under a key."""
    if (root := _root()) is None:
        return
    partial = files.unfinished_name(root / kind / key)
    try:
        _folder(root, kind)
        partial.write_bytes(hashlib.sha256(body).digest() + body)
        partial.replace(root / kind / key)
        if root not in _swept:
            _swept.add(root)
            _evict(root)
    except OSError as error:
        _warn(root, error)
    finally:
        _discard(partial)


def digest(file: Path) -> str:
    """Sha256 of a file (OSError: unreadable); taken once for as long as its size, times and inode stay."""
    stamp = _stamp(file)
    if (newest := max(stamp[-2:]) / 1e9 + _TICK_SECONDS - time.time()) > 0:
        time.sleep(min(newest, _TICK_SECONDS))
    key = hashlib.sha256(json.dumps([files.host(), *stamp]).encode()).hexdigest()[:32]
    if (known := read("digests", key)) is not None:
        return known.decode()
    value = files.sha256(file)
    if _stamp(file) == stamp:
        write("digests", key, value.encode())
    return value


def entry(kind: str, key: str, make: Callable[[Path], None], size: int = 0) -> Path | None:
    """A folder of files that were made once, each as it was made; None where there can be none.

    Args:
        kind: what they are, such as ``prepacked``.
        key: digest of everything they depend on.
        make: writes them into an empty folder. What it raises is told, or, of diagd's own, raised: no cache
            is to blame for it. Nothing is kept then.
        size: bytes they take, about; they are not made where there is no room.
    """
    if (root := _root()) is None:
        return None
    path = root / kind / key
    try:
        if not _is_whole(path):
            _make(root, path, make, size)
        if not _is_whole(path):
            return None
    except DiagdError:
        raise
    except Exception as error:  # whatever is wrong with a cache, it is not what was asked for
        _warn(root, error)
        return None
    _touch(path / ENTRY_NAME)
    return path


@dataclass(frozen=True)
class Usage:
    """What the cache holds: entries by kind, and bytes of all."""

    entries: dict[str, int]
    total_bytes: int


def usage() -> Usage:
    """Measure the cache."""
    root = cache_directory()
    paths = list(_entries(root)) if root else []
    return Usage(Counter(path.parent.name for path in paths), sum(map(_size, paths)))


def clear() -> Usage:
    """Remove every entry; returns what is left, which other processes may hold or this one may not remove."""
    root = cache_directory()
    for path in list(_entries(root, unfinished=True)) if root else ():
        _discard(path)
    return usage()


def _make(root: Path, path: Path, make: Callable[[Path], None], size: int) -> None:
    _folder(root, path.parent.name)
    _check_room(root, size)
    with turn(path, wait=False) as mine:
        if not mine or _is_whole(path):  # another process is filling it, which nothing is wrong with
            return
        if os.path.lexists(path):
            _warn(root, OSError(f"{path} is damaged or another user's; it is made anew"))
            retired = files.unfinished_name(path, "retired")
            path.rename(retired)
            _discard(retired)
        files.clear_leftovers(path)
        partial = files.unfinished_name(path)
        try:
            partial.mkdir()
            make(partial)
            made = {file.name: [file.stat().st_size, digest(file)] for file in partial.iterdir()}
            (partial / ENTRY_NAME).write_text(json.dumps(made), encoding="utf-8")
            for file in (*partial.iterdir(), partial):
                files.sync(file)
            try:
                partial.rename(path)
            except OSError:  # where there are no locks, another process was faster
                if not path.is_dir():
                    raise
        finally:
            _discard(partial)
        _evict(root, path)


def _check_room(root: Path, size: int) -> None:
    limit = limit_bytes(root)
    if size > limit:
        raise OSError(f"{size / 1e6:,.1f} MB are more than the {limit / 1e6:,.1f} MB it may hold")
    free = shutil.disk_usage(root).free
    if size + size // 10 > free:
        raise OSError(f"{size / 1e6:,.1f} MB do not fit: {free / 1e6:,.1f} MB are free")


def _is_whole(path: Path) -> bool:
    """Whether an entry has the files that were made, and no others, each with its digest."""
    try:
        if not (path / ENTRY_NAME).is_file():  # absent, or a pipe, which would be waited for
            return False
        made = json.loads((path / ENTRY_NAME).read_bytes())
        found = {file.name: file for file in path.iterdir() if file.name != ENTRY_NAME}
        return (
            isinstance(made, dict)
            and made.keys() == found.keys()
            and _is_ours(path)
            and all(_is_ours(file) and file.is_file() for file in found.values())
            and all([file.stat().st_size, digest(file)] == made[name] for name, file in found.items())
        )
    except (OSError, ValueError, RecursionError):
        return False


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user and the superuser could write it; links are nobody's."""
    status = path.lstat()
    return not path.is_symlink() and (not hasattr(os, "geteuid") or status.st_uid in (os.geteuid(), 0))


def _root() -> Path | None:
    root = cache_directory()
    if root is None:
        _warn(Path("cache"), OSError("there is no HOME"))
    return root


def _home() -> Path | None:
    if sys.platform == "win32":
        home = Path(os.environ.get("USERPROFILE", ""))
    else:
        home = Path(os.environ.get("HOME", ""))
        with suppress(ImportError, AttributeError, KeyError):
            if not home.is_absolute():
                import pwd

                home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    return home if home.is_absolute() else None


def _folder(root: Path, kind: str) -> None:
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    (root / kind).mkdir(exist_ok=True)


def _warn(root: Path, error: Exception) -> None:
    """One line a process and reason."""
    reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    if reason not in _warned:
        _warned.add(reason)
        _LOG.warning("going on without the cache at %s: %s (DIAGD_CACHE names another place)", root, reason)


def _entries(root: Path, *, unfinished: bool = False) -> Iterator[Path]:
    with suppress(OSError):
        for kind in [folder for folder in root.iterdir() if folder.is_dir() and not folder.is_symlink()]:
            for path in kind.iterdir():
                if unfinished or not path.name.startswith("."):
                    yield path


def _evict(root: Path, newest: Path | None = None) -> None:
    """Remove what was used least recently until the rest is within its limits, and what killed runs left."""
    found, total, small = [], 0, 0
    for path in _entries(root, unfinished=True):
        try:
            idle = _idle_seconds(path / ENTRY_NAME if path.is_dir() else path)
            size = _size(path)
        except OSError:
            continue
        if path.name.startswith("."):
            if files.is_unfinished(path.name) and idle > _ABANDONED_SECONDS:
                _discard(path)
            continue
        found.append((idle, size, path))
        total, small = total + size, small + (size < _SMALL)
    limit = limit_bytes(root)
    for idle, size, path in sorted(found, key=lambda item: -item[0]):
        if total <= limit and small <= _MOST_SMALL:
            return
        if path == newest or idle < _IN_USE_SECONDS:
            continue
        if total > limit or size < _SMALL:
            _discard(path)
            total, small = total - size, small - (size < _SMALL)


def _size(path: Path) -> int:
    try:
        parts = path.iterdir() if path.is_dir() else [path]
        return sum(part.lstat().st_size for part in parts)
    except OSError:
        return 0


def _discard(path: Path) -> None:
    try:
        files.remove(path)
    except OSError as error:
        _LOG.debug("cannot remove %s: %s", path, error)


def _touch(path: Path) -> None:
    """Note that an entry was used, if that was not noted lately."""
    with suppress(OSError):  # of a cache that can only be read
        if _idle_seconds(path) > _IN_USE_SECONDS / 2:
            os.utime(path)


def _idle_seconds(path: Path) -> float:
    """Since it was used; what was used in times to come was so by a clock that has been put right since."""
    return abs(time.time() - path.stat().st_mtime)


def _stamp(file: Path) -> list[Any]:
    status = file.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
