"""Where a verb may write: refused before any work, where something would be taken away or cannot be made."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from diagd.bundle.files import is_unfinished, unfinished_name
from diagd.bundle.manifest import MANIFEST_NAME
from diagd.errors import UsageError

BEGINNINGS: Mapping[str, tuple[int, tuple[bytes, ...]]] = {
    ".npy": (0, (b"\x93NUMPY",)),
    ".npz": (0, (b"PK",)),
    ".jsonl": (0, (b"{",)),
    ".mp4": (4, (b"ftyp",)),
    ".gif": (0, (b"GIF8",)),
    ".png": (0, (b"\x89PNG",)),
    ".safetensors": (8, (b"{",)),
}
"""How files of a kind begin: at which byte, and with what."""


def bundle_target(path: Path, option: str = "--output") -> Path:
    """Where a bundle can be written: nothing, an empty folder or a bundle is there; UsageError for all else.

    Links are followed.
    """
    place = _folder(path, option, "a bundle", _is_bundle)
    _try(place if place.exists() else _first_there(place) / place.name, option)
    return place


def folder_target(path: Path, marks: Mapping[str, bytes], what: str, option: str = "--output") -> Path:
    """Where a folder of results can be written; UsageError but for nothing, an empty one or one of its kind.

    ``marks``: files of which such a folder has at least one, and what stands near the beginning of each.
    ``what``, the name of the kind, and ``option`` are for the message.
    """
    place = _folder(
        path, option, what, lambda place: any(words in _head(place / name) for name, words in marks.items())
    )
    _try(_first_there(place) / place.name, option)
    return place


def file_target(
    path: Path, suffixes: Collection[str], option: str = "--output", begins: bytes | None = None
) -> Path:
    """Where a file can be written: nothing, an empty file or one of the same kind is there.

    ``begins``: how a file of its kind begins; None: as its suffix says. No suffixes: any.

    Raises:
        UsageError: another suffix, something else is there, or nothing can be written.
    """
    place = _resolved(path, option)
    if place.is_dir():
        raise UsageError(f"{option} {path}: it is a directory; name a file")
    if suffixes and path.suffix.lower() not in suffixes:
        *most, last = suffixes
        kinds = f"{', '.join(most)} or {last}" if most else last
        raise UsageError(f"{option} {path}: expected a name ending in {kinds}")
    if not place.parent.is_dir():
        why = "is no directory" if place.parent.exists() else "does not exist; make it first"
        raise UsageError(f"{option} {path}: the directory {place.parent} {why}")
    _check_open(place, path, option)
    start, beginnings = (0, (begins,)) if begins else BEGINNINGS[path.suffix.lower()]
    head = _head(place)
    if place.exists() and not (place.is_file() and (not head or head[start:].startswith(beginnings))):
        raise UsageError(
            f"{option} {path}: what is there is no such file of an earlier run, so it is not replaced; give "
            "another name, or remove it yourself"
        )
    _try(place, option)
    return place


def check_apart(path: Path, read: Mapping[str, Path | None], option: str = "--output") -> None:
    """Refuse (UsageError) an output that is one of the files that are read, given by their options."""
    for reader, source in read.items():
        if source is not None and source.exists() and path.exists() and path.samefile(source):
            raise UsageError(f"{option} {path} is what {reader} reads; give another name")


def check_distinct(written: Mapping[str, Path | None]) -> None:
    """Refuse (UsageError) options that name one file to be written."""
    taken: dict[Path, str] = {}
    for option, path in written.items():
        if path is not None and (other := taken.setdefault(path.resolve(), option)) != option:
            raise UsageError(f"{option} {path} is what {other} writes; give another name")


def is_where_one_works(path: Path) -> bool:
    """Whether a path is empty, the folder one works in, or one above it."""
    if os.fspath(path) in ("", "."):
        return True
    try:
        return Path.cwd().resolve().is_relative_to(path.resolve())
    except FileNotFoundError:  # somebody removed the folder one works in
        if path.is_absolute():
            return False
        raise


def _resolved(path: Path, option: str) -> Path:
    try:
        if not is_where_one_works(path):
            place = path.resolve()
            if place.is_symlink():  # from Python 3.13 on that is no error
                raise RuntimeError("its links go round in circles")
            return place
    except (OSError, RuntimeError) as error:  # links that go round in circles
        raise UsageError(f"{option} {path}: {error}; check the path") from error
    raise UsageError(
        f"{option} is empty or '.' or above it: the folder one works in is not replaced; name what is to be "
        "written"
    )


def _first_there(path: Path) -> Path:
    """The path, or the nearest folder above that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _folder(path: Path, option: str, what: str, is_one: Callable[[Path], bool]) -> Path:
    """A place where nothing, an empty folder or one of a kind is."""
    place = _resolved(path, option)
    there = _first_there(place)
    if not there.is_dir():
        raise UsageError(
            f"{option} {path}: {there} is no directory that can be written to, and {what} is one; "
            "give another place"
        )
    if _is_mount(place):
        raise UsageError(
            f"{option} {path}: it is a mount point, which cannot be replaced; name a folder in it"
        )
    _check_open(place, path, option)
    names = place.iterdir() if place.is_dir() else ()
    others = sorted(entry.name for entry in names if not is_unfinished(entry.name))
    if others and not is_one(place):
        held = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise UsageError(
            f"{option} {path}: the folder is not empty (it holds {held}) and not {what}; "
            "nothing is replaced: name one that is not there yet, or remove it yourself"
        )
    return place


def _is_mount(place: Path) -> bool:
    """Whether something is mounted at a place; a folder of the same file system is, for Linux alone."""
    if os.path.ismount(place):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    octal = re.compile(rb"\\([0-7]{3})")  # of blanks and the like
    points = (octal.sub(lambda code: bytes([int(code[1], 8)]), line.split(b" ")[4]) for line in mounts)
    return os.fsencode(place) in points


def _check_open(place: Path, path: Path, option: str) -> None:
    """Refuse to replace what nobody may write: a new file takes its name whatever its own rights are."""
    if place.exists() and not place.stat().st_mode & 0o222:
        allow = "attrib -r" if sys.platform == "win32" else "chmod u+w"
        raise UsageError(f"{option} {path}: it is write-protected; give another name, or allow it: {allow}")


def _try(place: Path, option: str) -> None:
    """Make and remove a file beside the one to be."""
    trial = unfinished_name(place)
    try:
        with trial.open("xb"):
            pass
    except OSError as error:
        raise UsageError(
            f"{option} {place}: {place.parent} cannot be written to ({error.strerror}); give another place"
        ) from error
    finally:
        with suppress(OSError):
            trial.unlink(missing_ok=True)


def _is_bundle(folder: Path) -> bool:
    file = folder / MANIFEST_NAME
    try:
        content = json.loads(file.read_bytes() if file.is_file() else b"")  # a pipe would not end
    except (OSError, ValueError, RecursionError):
        return False
    return (
        isinstance(content, dict) and "schema_version" in content and isinstance(content.get("files"), dict)
    )


def _head(file: Path) -> bytes:
    """How a file begins; nothing where none is."""
    if not file.is_file():
        return b""
    with file.open("rb") as opened:
        return opened.read(4096)
