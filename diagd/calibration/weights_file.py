"""The weights file of a quantised graph, written tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

ALIGNMENT = 4096
Array = NDArray[Any]


class WeightsFile:
    """Appends aligned tensors to a file that graphs refer to; memory stays at one chunk.

    Args:
        path: file to create.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._length = 0

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def begin(self) -> int:
        """Start a tensor; returns its offset."""
        offset = -(-self._length // ALIGNMENT) * ALIGNMENT
        self._file.write(b"\0" * (offset - self._length))
        self._length = offset
        return offset

    def write(self, chunk: Array) -> None:
        """Append to the tensor that was begun."""
        data = np.ascontiguousarray(chunk).tobytes()
        self._file.write(data)
        self._length += len(data)

    def finish(self, name: str, offset: int, shape: tuple[int, ...], kind: int) -> onnx.TensorProto:
        """The initializer of what was written since ``begin``; ``kind`` is its ONNX data type."""
        from onnx import TensorProto

        tensor = TensorProto(name=name, dims=shape, data_type=kind, data_location=TensorProto.EXTERNAL)
        where = {"location": self.path.name, "offset": offset, "length": self._length - offset}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def add(self, name: str, array: Array, kind: int | None = None) -> onnx.TensorProto:
        """Write a tensor that is at hand."""
        from onnx import helper

        offset = self.begin()
        self.write(array)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype) if kind is None else kind
        return self.finish(name, offset, array.shape, kind)
