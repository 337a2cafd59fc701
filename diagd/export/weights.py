"""The weights file: one aligned, memory-mappable file that every graph of a bundle refers to.

Where an export was interrupted, the same export goes on with its file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from diagd.bundle import cache
from diagd.bundle.files import leftovers, turn
from diagd.errors import CheckpointError
from diagd.export.checkpoints import Checkpoint, TensorHandle
from diagd.export.tracing import FOLD_LIMIT
from diagd.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir


ALIGNMENT = 4096
"""Bytes; a page, so that each tensor can be mapped on its own."""

CHUNK_BYTES = 64 << 20
"""Rows are read and converted in pieces of about this size."""

Array = NDArray[Any]
_FLOAT32 = np.dtype(np.float32)

SYNC_BYTES = 256 << 20
"""Tensors count as written once their bytes are on the disk, which is waited for after about so many."""


@dataclass(frozen=True)
class WeightSource:
    """A tensor that is read piece by piece: ``chunks()`` yields blocks of rows, in order.

    ``dtype`` is what a graph reads it as, where whoever lays the file out does not say otherwise. Its
    ``repr`` says all that a graph depends on, which is traced once for every data.
    """

    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Array]] = field(repr=False)
    dtype: np.dtype[Any] = _FLOAT32

    @property
    def bytes(self) -> int:
        """Size in a weights file."""
        return _bytes(self.shape, self.dtype)


def constant(array: Array) -> WeightSource:
    """A tensor that is at hand."""
    return WeightSource(array.shape, lambda: iter([array]), array.dtype)


def copied(handle: TensorHandle) -> WeightSource:
    """A tensor stored as the graph reads it."""

    def chunks() -> Iterator[Array]:
        if not handle.shape:
            yield handle.read()
            return
        step = _rows_in_chunk(handle.shape)
        for start in range(0, handle.shape[0], step):
            yield handle.read_rows(start, min(start + step, handle.shape[0]))

    return WeightSource(handle.shape, chunks)


def transposed(handles: Sequence[TensorHandle]) -> WeightSource:
    """Matrices stored [out, in], side by side as one [in, sum of out]."""
    shape = (handles[0].shape[1], sum(handle.shape[0] for handle in handles))

    def chunks() -> Iterator[Array]:
        matrices = [handle.read() for handle in handles]
        step = _rows_in_chunk(shape)
        for start in range(0, shape[0], step):
            yield np.concatenate([matrix[:, start : start + step].T for matrix in matrices], axis=1)

    return WeightSource(shape, chunks)


def _rows_in_chunk(shape: tuple[int, ...]) -> int:
    return max(1, CHUNK_BYTES // max(1, 4 * math.prod(shape[1:])))


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies in the weights file."""

    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]


def plan(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype[np.generic]]]) -> dict[str, Placement]:
    """Lay tensors out one behind the other, each aligned; order is that of the mapping."""
    placements, offset = {}, 0
    for name, (shape, dtype) in shapes.items():
        length = _bytes(shape, dtype)
        placements[name] = Placement(offset, length, shape, dtype)
        offset += -(-length // ALIGNMENT) * ALIGNMENT
    return placements


def _bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    bits = 4 if dtype == ml_dtypes.int4 else 8 * dtype.itemsize  # two 4-bit integers share a byte
    return -(-math.prod(shape) * bits // 8)


def total_bytes(placements: Mapping[str, Placement]) -> int:
    """Size of the weights file."""
    return max((p.offset + p.length for p in placements.values()), default=0)


def write(
    path: Path,
    placements: Mapping[str, Placement],
    sources: Mapping[str, WeightSource],
    progress: Callable[[int], None] = lambda _: None,
    done: Collection[str] = (),
    finished: Callable[[str, int], None] = lambda *_: None,
) -> None:
    """Stream every tensor to its place; memory stays at a few chunks whatever the model's size.

    Args:
        path: file to create, or to go on with.
        placements: from ``plan``.
        sources: a source for each placement, converted to the placement's dtype.
        progress: called with the bytes written by each chunk.
        done: tensors that the file holds already.
        finished: called with the name and the bytes of each tensor that is written.
    """
    import onnx_ir as ir

    with path.open("r+b" if done else "wb") as file:
        for name, placement in placements.items():
            if name in done:
                progress(placement.length)
                continue
            file.seek(placement.offset)
            for chunk in sources[name].chunks():
                stored = ir.Tensor(_converted(name, chunk, placement.dtype)).tobytes()  # 4 bits packed
                file.write(stored)
                progress(len(stored))
            file.flush()
            finished(name, placement.length)


def store(
    path: Path, sources: Mapping[str, WeightSource], progress: Callable[[int], None] = lambda _: None
) -> dict[str, ir.TensorProtocol]:
    """Write tensors for the graphs of a directory: small ones lie in the graph, the others in the file.

    Args:
        path: file to make, where there is anything to write.
        sources: by name; read in order, the small ones last.
        progress: called with the bytes written by each chunk.
    """
    import onnx_ir as ir

    large = {name: source for name, source in sources.items() if math.prod(source.shape) > FOLD_LIMIT}
    placements = plan({name: (source.shape, source.dtype) for name, source in large.items()})
    if large:
        write(path, placements, large, progress)
    found: dict[str, ir.TensorProtocol] = dict(external_tensors(placements, path.name, path.parent))
    for name, source in sources.items():
        if name not in large:
            array = np.concatenate([np.atleast_1d(chunk) for chunk in source.chunks()])
            found[name] = ir.Tensor(_converted(name, array, source.dtype).reshape(source.shape), name=name)
    return found


def _converted(name: str, chunk: NDArray[np.generic], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """A chunk in another type, every finite number of which stays finite.

    Raises:
        CheckpointError: one is too large for the type.
    """
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(chunk, dtype=dtype)
    if converted.dtype == np.float16 and chunk.dtype != np.float16 and np.isinf(converted).any():
        wide = np.asarray(chunk, np.float64)
        lost = np.isinf(converted) & np.isfinite(wide)
        if lost.any():
            largest = np.abs(wide[lost]).max()
            raise CheckpointError(
                f"tensor '{name.removeprefix('transformer.')}' holds {largest:.2g}, and {dtype} ends at "
                f"{np.finfo(converted.dtype).max:g}: it would be infinite; export it with --precision fp32"
            )
    return converted


def external_tensors(
    placements: Mapping[str, Placement], location: str, directory: Path
) -> dict[str, ir.ExternalTensor]:
    """Tensors of a graph that lies in a directory, beside the weights file of this name."""
    import onnx_ir as ir

    return {
        name: ir.ExternalTensor(
            location,
            p.offset,
            p.length,
            ir.DataType.from_numpy(p.dtype),
            shape=ir.Shape(p.shape),
            name=name,
            base_dir=directory,
        )
        for name, p in placements.items()
    }


class ResumableWeights:
    """A weights file beside the bundle to be, with a journal of the tensors that are complete.

    One with another ``key``, of what is exported, is started anew.
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
