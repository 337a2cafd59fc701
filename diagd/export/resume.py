"""The weights file of an interrupted export: the same export goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from diagd.bundle import cache
from diagd.export.checkpoints import Checkpoint
from diagd.export.weights import Placement

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
    def moved_to(self, path: Path) -> Iterator[None]:
        """Put the complete file in its place; it comes back if the block is interrupted."""
        self.sync()
        self.path.replace(path)
        try:
            yield
        except Exception:
            self.discard()
            raise
        except BaseException:
            path.replace(self.path)
            raise
        self.discard()

    def discard(self) -> None:
        """Forget everything."""
        self.path.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def _read(self) -> set[str]:
        try:
            lines = self._journal.read_text().splitlines()
        except OSError:
            lines = []
        if not lines or lines[0] != self._key or not self.path.is_file():
            self.discard()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._journal.write_text(self._key + "\n")
            return set()
        return set(lines[1:])

    def _sync(self) -> None:
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())
        with self._journal.open("a") as journal:
            journal.write("".join(f"{name}\n" for name in self._pending))
        self._pending, self._pending_bytes = [], 0


def is_resumable(output: Path) -> bool:
    """Whether an export to ``output`` would find finished tensors."""
    weights = ResumableWeights.path_of(output.resolve())
    try:
        return weights.is_file() and len(weights.with_suffix(".journal").read_text().splitlines()) > 1
    except OSError:
        return False


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
    return hashlib.sha256(json.dumps([source.source, stamps, layout]).encode()).hexdigest()
