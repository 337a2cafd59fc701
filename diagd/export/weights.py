"""The weights file: one aligned, memory-mappable file that every graph of a bundle refers to."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from diagd.errors import CheckpointError
from diagd.export.checkpoints import TensorHandle
from diagd.export.tracing import FOLD_LIMIT

if TYPE_CHECKING:
    import onnx_ir as ir

ALIGNMENT = 4096
"""Bytes; a page, so that each tensor can be mapped on its own."""

CHUNK_BYTES = 64 << 20
"""Rows are read and converted in pieces of about this size."""

Array = NDArray[Any]
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class WeightSource:
    """A tensor that is read piece by piece: ``chunks()`` yields blocks of rows, in order.

    ``dtype`` is what a graph reads it as, where whoever lays the file out does not say otherwise.
    """

    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Array]]
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
    with path.open("r+b" if done else "wb") as file:
        for name, placement in placements.items():
            if name in done:
                progress(placement.length)
                continue
            file.seek(placement.offset)
            for chunk in sources[name].chunks():
                converted = _packed(_converted(name, chunk, placement.dtype))
                file.write(converted.data.cast("B") if converted.dtype.kind == "f" else converted.tobytes())
                progress(converted.nbytes)
            file.flush()
            finished(name, placement.length)


def _packed(array: Array) -> Array:
    """4-bit integers two to a byte, the first in the low half, their number even; others as they are."""
    if array.dtype != ml_dtypes.int4:
        return array
    nibbles = array.astype(np.uint8).ravel() & 0xF
    return nibbles[0::2] | (nibbles[1::2] << 4)


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
