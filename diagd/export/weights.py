"""The weights file: one aligned, memory-mappable file that every graph of a bundle refers to.

Where an export was interrupted, the same export goes on with its file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, cache
from diagd.bundle.files import sync
from diagd.errors import BundleError, CheckpointError
from diagd.export.checkpoints import Checkpoint, TensorHandle
from diagd.export.checkpoints.location import is_index, shard_names
from diagd.export.step_graph import PLAIN, step_tensors
from diagd.export.tracing import FOLD_LIMIT
from diagd.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

WEIGHTS_NAME = "weights.bin"

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
        for rows in row_chunks(handle.shape):
            yield handle.read_rows(rows.start, rows.stop)

    return WeightSource(handle.shape, chunks)


def transposed(handles: Sequence[TensorHandle]) -> WeightSource:
    """Matrices stored [out, in], side by side as one [in, sum of out]."""
    shape = (handles[0].shape[1], sum(handle.shape[0] for handle in handles))

    def chunks() -> Iterator[Array]:
        matrices = [handle.read() for handle in handles]
        for rows in row_chunks(shape):
            yield np.concatenate([matrix[:, rows].T for matrix in matrices], axis=1)

    return WeightSource(shape, chunks)


def row_chunks(shape: tuple[int, ...], multiple: int = 1) -> Iterator[slice]:
    """Slices of rows of a float32 tensor, about ``CHUNK_BYTES`` each, in multiples of rows."""
    step = max(1, CHUNK_BYTES // max(1, 4 * multiple * math.prod(shape[1:]))) * multiple
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


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
    done: int = 0,
    finished: Callable[[int], None] = lambda _: None,
) -> None:
    """Stream every tensor to its place; memory stays at a few chunks whatever the model's size.

    Sources are converted to the dtypes of their placements. ``progress`` is called with the bytes of each
    chunk, ``finished`` with the byte at which a tensor ends; those up to ``done`` lie in the file already.
    """
    import onnx_ir as ir

    with path.open("r+b" if done else "wb") as file:
        for name, placement in placements.items():
            end = placement.offset + placement.length
            if end <= done:
                progress(placement.length)
                continue
            file.seek(placement.offset)
            for chunk in sources[name].chunks():
                stored = ir.Tensor(_converted(name, chunk, placement.dtype)).tobytes()  # 4 bits packed
                file.write(stored)
                progress(len(stored))
            file.flush()
            finished(end)


def store(
    path: Path, sources: Mapping[str, WeightSource], progress: Callable[[int], None] = lambda _: None
) -> dict[str, ir.TensorProtocol]:
    """Write tensors for the graphs of a directory: small ones lie in the graph, the others in the file.

    They are read in order, the small ones last; there is no file where all are small.
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
    """A chunk in another type; CheckpointError where it is no number, or would not stay finite."""
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(chunk, dtype=dtype)
    if converted.dtype.kind == "f" and np.isnan(converted).any():
        raise CheckpointError(
            f"tensor '{name.removeprefix('transformer.')}' holds nan, expected numbers: its training "
            "diverged or the file is damaged; use another checkpoint"
        )
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


class StoredWeights:
    """Tensors of graphs in floating point, mapped from their file; BundleError where it has another size."""

    def __init__(self, bundle: Bundle) -> None:
        self._path = bundle.file(WEIGHTS_NAME)
        manifest = bundle.manifest
        self._places = plan(step_tensors(manifest.transformer, np.dtype(manifest.cache.dtype)))
        expected, found = total_bytes(self._places), self._path.stat().st_size
        if found != expected:
            raise BundleError(
                f"{self._path} has {found} bytes, the weights of {manifest.name} are {expected}: "
                "export it again"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Array:
        """A tensor by its name in graphs, a read-only map."""
        place = self._places[name]
        return np.memmap(self._path, place.dtype, "r", place.offset, place.shape)

    def replace(self, name: str, values: Array) -> None:
        """Put other values into the file, in its own type."""
        place = self._places[name]
        np.memmap(self._path, place.dtype, "r+", place.offset, place.shape)[...] = values

    def tensors(self) -> dict[str, ir.TensorProtocol]:
        """All of them, as ``NAME`` and ``NAME.plain``, for a graph beside the file."""
        found = external_tensors(self._places, WEIGHTS_NAME, self._path.parent)
        return {**found, **{name + PLAIN: tensor for name, tensor in found.items()}}


class ResumableWeights(AbstractContextManager["ResumableWeights", None]):
    """A weights file in a hidden folder beside the bundle to be, with a journal of what is on the disk.

    One with another ``key``, of what is exported, is started anew. As a context it is gone at the end, or
    stays for the same export where that is interrupted.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.path = self.path_of(output)
        self._journal = self.path.with_suffix(".journal")
        self.done = self._finished = self._noted = self._read(key)

    @staticmethod
    def path_of(output: Path) -> Path:
        """Where the weights of a bundle at ``output`` are until it is whole."""
        return output.with_name(f".{output.name}.weights.partial") / WEIGHTS_NAME

    def finished(self, end: int) -> None:
        """Note that tensors up to a byte were written."""
        self._finished = end
        if end - self._noted >= SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Have all that is finished on the disk, and noted."""
        if self._finished == self._noted:
            return
        sync(self.path)
        with self._journal.open("a", encoding="utf-8", newline="\n") as journal:
            journal.write(f"{self._finished}\n")
        self._noted = self._finished

    def place(self, path: Path) -> None:
        """Give the complete file a second name."""
        try:
            os.link(self.path, path)
        except OSError:  # no hard links here: an export that is stopped from now on is done again
            self.path.replace(path)

    def discard(self) -> None:
        """Forget everything; what else somebody put into the folder stays."""
        home = self.path.parent
        if home.is_symlink() or not home.is_dir():  # earlier versions had a file of that name
            home.unlink(missing_ok=True)
            return
        self.path.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)
        with suppress(OSError):  # it is not empty
            home.rmdir()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):
            self.discard()
        else:
            self.sync()

    def _read(self, key: str) -> int:
        known, *ends = _notes(self._journal) or ("",)
        if known == key and ends and self.path.is_file():
            status = self.path.stat()
            if status.st_size >= int(ends[-1]) and status.st_nlink == 1:  # else it lies in a whole bundle
                return int(ends[-1])
        self.discard()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._journal.write_text(key + "\n", encoding="utf-8", newline="\n")
        return 0


def _notes(journal: Path) -> list[str]:
    """The key of a journal, and the bytes it says are on the disk; nothing where it is damaged."""
    try:
        key, *ends = journal.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    return [key, *ends] if all(map(str.isdecimal, ends)) else []


def is_resumable(output: Path) -> bool:
    """Whether an export to ``output`` would find finished tensors."""
    weights = ResumableWeights.path_of(output.resolve())
    return weights.is_file() and len(_notes(weights.with_suffix(".journal"))) > 1


def shown_source(source: str) -> str:
    """A checkpoint's name for others: without the folders it lies in here, in characters all can read."""
    name = Path(source).name if Path(source).exists() else source
    return os.fsencode(name).decode(errors="backslashreplace")


def source_digest(source: str) -> str | None:
    """Digest of a local checkpoint: of the file, or of digests and names of its shards or its folder's."""
    path = Path(source)
    files = _files(path)
    if files == [path]:
        return cache.digest(path)
    home = path if path.is_dir() else path.parent
    parts = [f"{cache.digest(file)} {file.relative_to(home).as_posix()}" for file in files]
    return hashlib.sha256(os.fsencode("\n".join(parts))).hexdigest() if parts else None


def _files(path: Path) -> list[Path]:
    """Of a local checkpoint: itself, with its shards where it is an index, or all in a folder."""
    if path.is_file():
        shards = sorted(set(shard_names(path).values())) if is_index(path.name) else []
        return [path, *(path.with_name(shard) for shard in shards)]
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []


def export_key(source: Checkpoint, placements: Mapping[str, Placement]) -> str:
    """Digest of what a weights file is made from: the layout, and the source's name, sizes and times."""
    stamps = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in _files(Path(source.source))]
    layout = [[name, p.offset, p.length, p.dtype.name] for name, p in placements.items()]
    return hashlib.sha256(json.dumps([__version__, source.source, stamps, layout]).encode()).hexdigest()
