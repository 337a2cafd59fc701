"""Files that appear whole or not at all, and take nothing away that is not theirs."""

from __future__ import annotations

import ctypes
import errno
import gc
import hashlib
import logging
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import BinaryIO

from diagd.errors import UsageError

_LOG = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
"""Errors of a disk, or a share of it, that holds no more."""
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
"""Errors of file systems that flush nothing, as some of other machines and in user space."""
_NO_RIGHTS = (*_UNABLE, errno.EPERM)
"""Errors of file systems that keep no rights of files: those of Windows, of other machines, of clouds."""

_SYNCHRONIZE, _NO_SUCH_PROCESS, _STILL_WAITING = 0x100000, 87, 258
"""Of Windows: a right to wait, ERROR_INVALID_PARAMETER and WAIT_TIMEOUT."""

CHUNK_BYTES = 8 << 20

_MOST_TEXT = 1 << 29
_PATIENCE_SECONDS = 2.0
_POLL_SECONDS = 0.05

_APPLE_DOUBLE = b"\x00\x05\x16\x07"

_UNFINISHED = re.compile(
    r"\.(?P<of>.+)\.(?P<host>[0-9a-f]{8})\.(?P<run>(?P<process>\d+)\.[0-9a-f]{6})"
    r"\.(?P<kind>partial|retired)(\.[^.]*)?"
)
"""Names of partial results, as `unfinished_name` makes them."""


def sha256(path: Path) -> str:
    """Hex digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(path: Path, what: str) -> str:
    """A text that somebody wrote (UTF-8), also out of a pipe; lines end in a line feed, whatever they did.

    Raises:
        UsageError: ``what`` cannot be read from it, as it is absent, is no such text, or has no end.
    """
    waiting = threading.Timer(_PATIENCE_SECONDS, _LOG.warning, ("still reading %s: has it an end?", path))
    waiting.daemon = True
    waiting.start()
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_TEXT + 1)
        if len(content) > _MOST_TEXT:
            raise OSError(errno.EOVERFLOW, f"it has more than {_MOST_TEXT:,} bytes; split it", str(path))
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read {what} {path}: it is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror or error}") from error
    finally:
        waiting.cancel()


def open_file(path: Path) -> BinaryIO:
    """A file that is read here and there; OSError: it is none, or a pipe or device, which has no size."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.ESPIPE, "it is a pipe or device, not a file", str(path))
    return path.open("rb")


def instead(path: Path) -> str | None:
    """What a file is that stands where another was meant, by how it begins; None: nothing that is known."""
    try:
        with open_file(path) as file:
            start = file.read(512)
    except OSError:
        return None
    if not start:
        return "is empty; download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run: git lfs pull"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        return "is a web page, not the file itself; download it again, signed in"
    if start.startswith(_APPLE_DOUBLE):
        return f"holds what macOS notes about a file; pass the file itself, {path.name.removeprefix('._')}"
    return None


def sync(path: Path) -> None:
    """Flush a file or directory to disk, where the system can."""
    if sys.platform == "win32" and (path.is_dir() or not os.access(path, os.W_OK)):
        return
    # Windows flushes no file that is open to be read alone
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
    finally:
        os.close(handle)


@cache
def host() -> str:
    """Short name of this machine and of its process numbers, which repeat across machines and containers."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text(encoding="utf-8"))
    with suppress(OSError, NotImplementedError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()[:8]


def unfinished_name(path: Path, kind: str = "partial") -> Path:
    """A hidden name beside ``path`` that no other process, here or elsewhere, makes."""
    return path.with_name(f".{path.name}.{host()}.{os.getpid()}.{secrets.token_hex(3)}.{kind}")


def is_unfinished(name: str) -> bool:
    """Whether a name is that of a partial result, of whatever machine."""
    return _UNFINISHED.fullmatch(name) is not None


def clear_leftovers(path: Path) -> None:
    """Remove what killed runs left beside ``path``; what one of them had moved away comes back.

    What belongs to processes that are alive, and to other machines and containers, stays.
    """
    names = filter(None, (_UNFINISHED.fullmatch(entry.name) for entry in path.parent.iterdir()))
    left = [
        (name["kind"], name["run"], path.with_name(name[0]))
        for name in names
        if name["of"] == path.name and name["host"] == host() and not _is_alive(int(name["process"]))
    ]
    unfinished = {run for kind, run, _ in left if kind == "partial"}
    for kind, run, entry in sorted(left, reverse=True):
        if kind == "retired" and (run in unfinished or not path.exists()):
            remove(path)  # what is there, if anything, is the rest of it
            entry.replace(path)
            _LOG.warning("put back %s, which a run that was killed had moved away", path)
            continue
        remove(entry)
        _LOG.warning("removed %s, left by a run that was killed", entry)


def remove(path: Path) -> None:
    """Remove a file or link, or a folder with all that can be removed, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if sys.platform == "win32":  # where signal 0 is Ctrl-C
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.OpenProcess.restype = ctypes.c_void_p
        handle = kernel.OpenProcess(_SYNCHRONIZE, False, ctypes.c_uint32(process))
        if not handle:
            return bool(ctypes.get_last_error() != _NO_SUCH_PROCESS)
        handle = ctypes.c_void_p(handle)
        is_running = bool(kernel.WaitForSingleObject(handle, 0) == _STILL_WAITING)
        kernel.CloseHandle(handle)
        return is_running
    try:
        os.kill(process, 0)
    except (OSError, OverflowError) as error:
        return not isinstance(error, ProcessLookupError)
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that replaces it, with its rights, on success and vanishes on failure.

    A symbolic link stays one: the file it points to is replaced.

    Raises:
        UsageError: a directory, device or pipe is there.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file, so it is not replaced; give another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    partial = unfinished_name(path)
    partial = partial.with_name(partial.name + path.suffix)
    try:
        yield partial
        if path.exists():
            allow(partial, path.stat().st_mode)
        sync(partial)
        move(partial, path)
    except OSError as error:
        _name(error, path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def move(path: Path, target: Path) -> None:
    """Rename, in place of a file that is there; on Windows until scanners of new files let go of it."""
    end = time.monotonic() + (_PATIENCE_SECONDS if sys.platform == "win32" else 0.0)
    while True:
        try:
            path.replace(target)
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
            time.sleep(_POLL_SECONDS)


def _name(error: OSError, path: Path) -> None:
    """Say where a disk is full: an error of a write alone does not."""
    if error.errno in FULL and error.filename is None:
        error.filename = str(path)


def write_text(path: Path, text: str) -> None:
    """Write a file of text (UTF-8), whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def usual_rights(path: Path) -> Iterator[None]:
    """Give a new file the rights that files get here; libraries of tensors write for their owner alone."""
    path.touch()
    rights = path.stat().st_mode
    yield
    allow(path, rights)


def allow(path: Path, rights: int) -> None:
    """Give a file or folder rights, where its file system keeps any."""
    try:
        path.chmod(stat.S_IMODE(rights))
    except OSError as error:
        if error.errno not in _NO_RIGHTS:
            raise
        _LOG.debug("no rights for %s: %s", path, error)


@contextmanager
def atomic_directory(path: Path, ours: Collection[str] = ()) -> Iterator[Path]:
    """A temporary directory beside ``path`` that takes its place on success and vanishes on failure.

    Whatever else lies in the old one comes along. A symbolic link stays one: what it points to is replaced.
    ``ours``: files of the old directory, relative to it, that the new one stands for.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    partial = unfinished_name(path)
    retired = partial.with_suffix(".retired")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            allow(partial, path.stat().st_mode)
            carry_over(path, partial, ours)
        for file in sorted(partial.rglob("*")):
            if file.is_file() or file.is_dir():
                sync(file)
        sync(partial)
        if sys.platform == "win32":
            gc.collect()  # it moves no folder with a file that is mapped, as by arrays nobody holds any more
        _swap(partial, path, retired)
        sync(path.parent)
        for old in (partial, retired):
            if old.exists():
                carry_over(old, path, ours, late=True)
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        _name(error, path)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(new: Path, path: Path, retired: Path) -> None:
    """Put ``new`` at ``path``; what was there is then at ``new`` or at ``retired``."""
    if path.exists():
        if _exchange(new, path):
            return
        try:
            move(path, retired)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy_away(path, retired)  # a folder of a container's image cannot be renamed
    move(new, path)


def _copy_away(path: Path, retired: Path) -> None:
    copy = unfinished_name(path)
    try:
        shutil.copytree(path, copy, symlinks=True)
        copy.replace(retired)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    shutil.rmtree(path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step where the system and the file system can (Linux: renameat2)."""
    at_working_directory, exchange = -100, 2
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    first, second = os.fsencode(one), os.fsencode(other)
    return bool(rename(at_working_directory, first, at_working_directory, second, exchange) == 0)


def carry_over(old: Path, new: Path, ours: Collection[str] = (), *, late: bool = False) -> None:
    """Link what ``old`` holds beside ``ours`` into ``new``; a name that ``new`` needs itself gets another.

    ``late``: only what is not there yet.
    """
    for file in _files(old):
        name = file.relative_to(old)
        if name.as_posix() in ours or any(is_unfinished(part) for part in name.parts):
            continue
        target = new / name
        if os.path.lexists(target):
            if late or file.is_dir():
                continue
            names = (new / f"{name}.kept{number or ''}" for number in count())
            target = next(path for path in names if not os.path.lexists(path))
            _LOG.warning("kept %s as %s: the new files need its name", file, target.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        link(file, target)


def _files(folder: Path) -> Iterator[Path]:
    """Everything in a folder but folders that hold something; links are not followed."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or not entry.is_dir():
            yield entry
        elif any(entry.iterdir()):
            yield from _files(entry)
        else:
            yield entry


def link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where there can be none; a new folder for an empty one."""
    if source.is_dir() and not source.is_symlink():
        target.mkdir(exist_ok=True)
        return
    try:
        # Windows, which knows no such choice, makes a second name of the link itself too
        os.link(source, target, follow_symlinks=os.link not in os.supports_follow_symlinks)
    except (OSError, NotImplementedError):  # another file system, or one without hard links
        shutil.copyfile(source, target, follow_symlinks=False)
        with suppress(OSError):  # one without rights or times
            shutil.copystat(source, target, follow_symlinks=False)
