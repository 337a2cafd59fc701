"""The weights of a bundle's transformer, as the export laid them out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.errors import BundleError
from diagd.export import weights
from diagd.export.exporter import WEIGHTS_NAME, step_shapes
from diagd.export.tracing import FOLD_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

Array = NDArray[Any]
Float = NDArray[np.float32]

CHUNK_BYTES = 64 << 20


class StoredWeights:
    """Tensors of the graphs in floating point, mapped from their file, never read whole.

    Raises:
        BundleError: the file is not as the export writes it.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._path = bundle.file(WEIGHTS_NAME)
        manifest = bundle.manifest
        self._places = weights.plan(step_shapes(manifest.transformer, np.dtype(manifest.cache.dtype)))
        expected, found = weights.total_bytes(self._places), self._path.stat().st_size
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

    def tensors(self) -> dict[str, ir.TensorProtocol]:
        """All of them, for a graph beside the file; those that a graph's simplification reads lie in it.

        The file may be a hard link, which onnx_ir refuses to read.
        """
        import onnx_ir as ir

        found: dict[str, ir.TensorProtocol] = {}
        found |= weights.external_tensors(self._places, WEIGHTS_NAME, self._path.parent)
        small = [name for name, place in self._places.items() if math.prod(place.shape) <= FOLD_LIMIT]
        return found | {name: ir.Tensor(np.array(self[name]), name=name) for name in small}


@dataclass(frozen=True)
class Weight:
    """A stored tensor [N] or [K, N] with factors of its rows and columns, read in blocks.

    Attributes:
        stored: the tensor is one of these.
        name: of the tensor.
        dtype: of what is computed with it.
        rows: float32 [K], multiplied.
        columns: float32 [N], divided by.
    """

    stored: StoredWeights
    name: str
    dtype: np.dtype[Any]
    rows: Float | None = None
    columns: Float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[K, N]; K is 1 for vectors."""
        shape: tuple[int, int] = np.atleast_2d(self.stored[self.name]).shape
        return shape

    def block(self, rows: slice, columns: slice = slice(None)) -> Float:
        """float32 [rows, columns]."""
        # Mapped anew each time: pages of a map that is kept would add up to the whole file.
        block = np.asarray(np.atleast_2d(self.stored[self.name])[rows, columns], np.float32)
        if self.rows is not None:
            block = block * self.rows[rows, None]
        return block if self.columns is None else block / self.columns[columns]

    def source(self) -> weights.WeightSource:
        """The tensor with its factors applied."""

        def chunks() -> Iterator[Array]:
            for rows in row_chunks(self.shape):
                yield self.block(rows)

        return weights.WeightSource(self.stored[self.name].shape, chunks, self.dtype)


def row_chunks(shape: tuple[int, ...], multiple: int = 1) -> Iterator[slice]:
    """Slices of rows of a float32 matrix, about ``CHUNK_BYTES`` each, in multiples of rows."""
    step = max(1, CHUNK_BYTES // (4 * shape[1] * multiple)) * multiple
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))
