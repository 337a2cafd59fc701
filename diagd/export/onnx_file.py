"""What an ONNX file says of itself; weights stay on the disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from diagd.bundle.files import instead
from diagd.bundle.manifest import GraphWeights
from diagd.errors import BundleError, require

if TYPE_CHECKING:
    import onnx_ir as ir

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
    serde = require("onnx_ir", extra="export", purpose="read an ONNX file").serde
    try:
        model = onnx.load(path, load_external_data=False)
        if not model.HasField("graph"):
            raise BundleError("it holds no graph")
        return _summary(serde.deserialize_model(model))
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read: {error.strerror}; check the path, or copy its bundle afresh"
        ) from error
    except Exception as error:  # the class that protobuf raises for damage depends on its build
        raise BundleError(f"{path} cannot be read as ONNX: {instead(path) or error}") from error


def _summary(model: ir.Model) -> OnnxFile:
    import onnx_ir as ir
    from onnx_ir.passes.common import InlinePass

    InlinePass()(model)
    graph = model.graph
    tensors = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    by_row, whole = set[str | None](), set[str | None]()
    for node in graph:
        rows, inputs = node.op_type in _LOOKUPS, [value.name if value else None for value in node.inputs]
        by_row.update(inputs[:rows])
        whole.update(inputs[rows:])
    return OnnxFile(
        opset=model.opset_imports.get("", 0),
        inputs=tuple(map(_value, graph.inputs)),
        outputs=tuple(map(_value, graph.outputs)),
        operators=Counter(".".join(filter(None, (node.domain, node.op_type))) for node in graph),
        initializers=tuple(
            _value(tensor)._replace(bytes=tensor.nbytes, looked_up=tensor.name in by_row - whole)
            for tensor in tensors
        ),
        weight_files=tuple(sorted({str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)})),
    )


def _value(value: ir.Value | ir.TensorProtocol) -> Value:
    axes = [axis if isinstance(axis, int) else axis.value or "?" for axis in value.shape or ()]
    kind = value.dtype.name.lower() if value.dtype else "undefined"
    return Value(str(value.name), _NAMES.get(kind, kind), tuple(axes))
