"""What an ONNX file says of itself; weights stay on the disk."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from diagd.bundle.files import instead
from diagd.bundle.manifest import GraphWeights
from diagd.errors import BundleError, require

_LOOKUPS: Final = ("Gather", "GatherND", "GatherElements")
"""Operators that read their first input by row."""

_NAMES: Final = {"float": "float32", "double": "float64"}
"""NumPy names of the element types that ONNX calls otherwise."""


class Value(NamedTuple):
    """An input, an output or a constant of a graph; an axis is a number or the name of a dynamic one.

    ``bytes``: of a constant, as stored. ``looked_up``: it is only read by row, never as a whole.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    bytes: int = 0
    looked_up: bool = False


@dataclass(frozen=True)
class OnnxFile:
    """Summary of one ONNX file; ``weight_files``: where its external tensors lie, sorted."""

    opset: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operators: Counter[str]
    initializers: tuple[Value, ...]
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
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read: {error.strerror}; check the path, or copy its bundle afresh"
        ) from error
    except Exception as error:  # the class that protobuf raises for damage depends on its build
        raise BundleError(f"{path} cannot be read as ONNX: {instead(path) or error}") from error


def _summary(model: Any) -> OnnxFile:
    # of onnx alone: onnx_ir imports SymPy, which takes half of the time in which a bundle is shown
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data
    from onnx.inliner import inline_local_functions

    graph = (inline_local_functions(model) if model.functions else model).graph
    by_row, whole = set[str](), set[str]()
    for node in graph.node:
        rows = node.op_type in _LOOKUPS
        by_row.update(node.input[:rows])
        whole.update(node.input[rows:])
    external = filter(uses_external_data, graph.initializer)
    return OnnxFile(
        opset=next((opset.version for opset in model.opset_import if not opset.domain), 0),
        inputs=tuple(map(_value, graph.input)),
        outputs=tuple(map(_value, graph.output)),
        operators=Counter(".".join(filter(None, (node.domain, node.op_type))) for node in graph.node),
        initializers=tuple(_constant(tensor, by_row - whole) for tensor in graph.initializer),
        weight_files=tuple(sorted({str(ExternalDataInfo(tensor).location) for tensor in external})),
    )


def _value(value: Any) -> Value:
    kind = value.type.tensor_type
    axes = (a.dim_value if a.HasField("dim_value") else a.dim_param or "?" for a in kind.shape.dim)
    return Value(value.name, _dtype(kind.elem_type), tuple(axes))


def _constant(tensor: Any, by_row: set[str]) -> Value:
    dtype, shape = _dtype(tensor.data_type), tuple(tensor.dims)
    bits = re.search(r"\d+", dtype)
    size = math.ceil(math.prod(shape) * int(bits[0] if bits else 8) / 8)  # of BOOL, a byte
    return Value(tensor.name, dtype, shape, size, tensor.name in by_row)


def _dtype(number: int) -> str:
    from onnx import TensorProto

    kind: str = TensorProto.DataType.Name(number).lower()
    return _NAMES.get(kind, kind)
