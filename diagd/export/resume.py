"""The weights file of an interrupted export: the same export goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

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
        self.path = output.with_name(f".{output.name}.weights.partial")
        self._journal = self.path.with_suffix(".journal")
        self._key = key
        self._pending: list[str] = []
        self._pending_bytes = 0
        self.done = self._read()

    def finished(self, name: str, size: int) -> None:
        """Note that a tensor was written."""
        self._pending.append(name)
        self._pending_bytes += size
        if self._pending_bytes >= SYNC_BYTES:
            self._sync()

    def move_to(self, path: Path) -> None:
        """Put the complete file in its place."""
        self.path.replace(path)
        self._journal.unlink(missing_ok=True)

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


def export_key(source: Checkpoint, placements: Mapping[str, Placement]) -> str:
    """Digest of what a weights file is made from: the layout, and the source's name, sizes and times."""
    stamps = []
    path = Path(source.source)
    if path.exists():
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        stamps = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
    layout = [[name, p.offset, p.length, p.dtype.name] for name, p in placements.items()]
    return hashlib.sha256(json.dumps([source.source, stamps, layout]).encode()).hexdigest()
