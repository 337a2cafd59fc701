"""What an ONNX file says of itself, by the onnx package; weights stay on the disk."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from diagd.bundle.manifest import GraphWeights
from diagd.errors import BundleError, require

if TYPE_CHECKING:
    import onnx

_LOOKUPS: Final = ("Gather", "GatherND", "GatherElements")
"""Operators that read their first input by row."""

_NAMES: Final = {"float": "float32", "double": "float64"}
"""NumPy names of the element types that ONNX calls otherwise."""


@dataclass(frozen=True)
class Value:
    """A graph input or output; an axis is a number or the name of a dynamic one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Initializer:
    """A constant of the graph; ``looked_up``: only ever read by row, never as a whole."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    looked_up: bool

    @property
    def bytes(self) -> int:
        """Bytes as stored; an element of less than 8 bits shares its byte."""
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(math.prod(self.shape) * (int(bits[0]) if bits else 8) / 8)


@dataclass(frozen=True)
class OnnxFile:
    """Summary of one ONNX file; ``weight_files``: where its external tensors lie, sorted."""

    opset: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operators: Counter[str]
    initializers: tuple[Initializer, ...]
    weight_files: tuple[str, ...]

    @property
    def weights(self) -> GraphWeights:
        """What the manifest records of them."""
        return GraphWeights(
            files=self.weight_files,
            streamed=sum(tensor.bytes for tensor in self.initializers if not tensor.looked_up),
            looked_up=sum(tensor.bytes for tensor in self.initializers if tensor.looked_up),
        )

    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes of the constants by element type, largest first."""
        total: Counter[str] = Counter()
        for tensor in self.initializers:
            total[tensor.dtype] += tensor.bytes
        return dict(total.most_common())


def read_onnx(path: Path) -> OnnxFile:
    """Summarise an ONNX file.

    Raises:
        BundleError: the file cannot be read or is no ONNX model.
        DependencyError: onnx is not installed.
    """
    onnx = require("onnx", extra="export", purpose="read an ONNX file")
    try:
        model = onnx.load(path, load_external_data=False)
        if not model.HasField("graph"):
            raise BundleError("it holds no graph")
        return _summary(model)
    except Exception as error:  # the class that protobuf raises for damage depends on its build
        raise BundleError(f"{path} cannot be read as ONNX: {error}") from error


def _summary(model: onnx.ModelProto) -> OnnxFile:
    graph = model.graph
    by_row, whole = set[str](), set[str]()
    for node in graph.node:
        rows = 1 if node.op_type in _LOOKUPS else 0
        by_row.update(node.input[:rows])
        whole.update(node.input[rows:])
    looked_up = by_row - whole
    locations = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return OnnxFile(
        opset=next((entry.version for entry in model.opset_import if not entry.domain), 0),
        inputs=tuple(_value(value) for value in graph.input),
        outputs=tuple(_value(value) for value in graph.output),
        operators=Counter(".".join(filter(None, (node.domain, node.op_type))) for node in graph.node),
        initializers=tuple(
            Initializer(tensor.name, _dtype(tensor.data_type), tuple(tensor.dims), tensor.name in looked_up)
            for tensor in graph.initializer
        ),
        weight_files=tuple(sorted(locations)),
    )


def _value(value: onnx.ValueInfoProto) -> Value:
    tensor = value.type.tensor_type
    axes = (
        axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?" for axis in tensor.shape.dim
    )
    return Value(value.name, _dtype(tensor.elem_type), tuple(axes))


def _dtype(number: int) -> str:
    from onnx import TensorProto

    name = str(TensorProto.DataType.Name(number)).lower()
    return _NAMES.get(name, name)
