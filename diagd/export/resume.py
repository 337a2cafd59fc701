"""The weights file of an interrupted export: the same export goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diagd.bundle import cache
from diagd.bundle.files import leftovers
from diagd.bundle.lock import turn
from diagd.export.checkpoints import Checkpoint
from diagd.export.weights import Placement
from diagd.version import __version__

SYNC_BYTES = 256 << 20
"""Tensors count as written once their bytes are on the disk, which is waited for after about so many."""


class ResumableWeights:
    """A weights file beside the bundle to be, with a journal of the tensors that are complete.

    Args:
        output: the bundle's path.
        key: of what is exported; a file with another key is started anew.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.path = self.path_of(output)
        self._journal = self.path.with_suffix(".journal")
        self._key = key
        self._pending: list[str] = []
        self._pending_bytes = 0
        self.done = self._read()

    @staticmethod
    def path_of(output: Path) -> Path:
        """Where the weights of a bundle at ``output`` are until it is whole."""
        return output.with_name(f".{output.name}.weights.partial")

    def finished(self, name: str, size: int) -> None:
        """Note that a tensor was written."""
        self._pending.append(name)
        self._pending_bytes += size
        if self._pending_bytes >= SYNC_BYTES:
            self._sync()

    def sync(self) -> None:
        """Have all that is finished on the disk, and noted."""
        if self._pending:
            self._sync()

    @contextmanager
    def placed_at(self, path: Path) -> Iterator[None]:
        """Put the complete file in its place; it comes back if the block is interrupted.

        Until ``discard`` the journal tells which file it is: ``recover`` finds it if the run is killed.
        """
        self.sync()
        self._note({"placed": _stamp(self.path)})
        self.path.replace(path)
        try:
            yield
        except Exception:
            self.discard()
            raise
        except BaseException:
            path.replace(self.path)
            raise

    @classmethod
    def recover(cls, output: Path, name: str) -> None:
        """Take back the file ``name`` that a killed run had placed in the bundle it was making."""
        home = cls.path_of(output)
        with turn(output):
            notes = _notes(home.with_suffix(".journal"))[1]
            for entry, _, _ in leftovers(output) if notes else ():
                file = entry / name
                if file.is_file() and notes[-1].get("placed") == _stamp(file):
                    file.replace(home)

    def discard(self) -> None:
        """Forget everything."""
        self.path.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def _read(self) -> set[str]:
        key, notes = _notes(self._journal)
        sizes = [note["bytes"] for note in notes if "bytes" in note]
        if key == self._key and sizes and self.path.is_file() and self.path.stat().st_size >= sizes[-1]:
            return {name for note in notes for name in note.get("tensors", ())}
        self.discard()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._journal.write_text(self._key + "\n", encoding="utf-8")
        return set()

    def _sync(self) -> None:
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        self._note({"tensors": self._pending, "bytes": size})
        self._pending, self._pending_bytes = [], 0

    def _note(self, note: dict[str, Any]) -> None:
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(note) + "\n")


def _notes(journal: Path) -> tuple[str, list[dict[str, Any]]]:
    """The key of a journal and its notes; none where it is not as it was written."""
    try:
        key, *lines = journal.read_text(encoding="utf-8").splitlines()
        return key, [dict(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, RecursionError):
        return "", []


def _stamp(file: Path) -> list[int]:
    """What tells a file from others whatever its name."""
    status = file.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def is_resumable(output: Path) -> bool:
    """Whether an export to ``output`` would find finished tensors."""
    weights = ResumableWeights.path_of(output.resolve())
    return weights.is_file() and bool(_notes(weights.with_suffix(".journal"))[1])


def shown_source(source: str) -> str:
    """A checkpoint's name for others: without the folders it lies in here, in characters all can read."""
    name = Path(source).name if Path(source).exists() else source
    return os.fsencode(name).decode(errors="backslashreplace")


def source_digest(source: str) -> str | None:
    """Digest of a local checkpoint: of the file, or of the digests and names of those in its folder."""
    path = Path(source)
    if path.is_file():
        return cache.digest(path)
    parts = [f"{cache.digest(file)} {file.relative_to(path).as_posix()}" for file in _files(path)]
    return hashlib.sha256(os.fsencode("\n".join(parts))).hexdigest() if parts else None


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []


def export_key(source: Checkpoint, placements: Mapping[str, Placement]) -> str:
    """Digest of what a weights file is made from: the layout, and the source's name, sizes and times."""
    stamps = []
    path = Path(source.source)
    if path.exists():
        files = _files(path) or [path]
        stamps = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
    layout = [[name, p.offset, p.length, p.dtype.name] for name, p in placements.items()]
    return hashlib.sha256(json.dumps([__version__, source.source, stamps, layout]).encode()).hexdigest()
