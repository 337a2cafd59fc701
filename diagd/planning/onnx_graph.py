"""Reads what an ONNX file says of itself, without the onnx package and without touching weights."""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from diagd.errors import BundleError
from diagd.planning.protobuf import encode, fields, message, packed, text

ELEMENTS: Final = {
    1: ("float32", 4.0),
    2: ("uint8", 1.0),
    3: ("int8", 1.0),
    4: ("uint16", 2.0),
    5: ("int16", 2.0),
    6: ("int32", 4.0),
    7: ("int64", 8.0),
    9: ("bool", 1.0),
    10: ("float16", 2.0),
    11: ("float64", 8.0),
    16: ("bfloat16", 2.0),
    17: ("float8e4m3fn", 1.0),
    19: ("float8e5m2", 1.0),
    21: ("uint4", 0.5),
    22: ("int4", 0.5),
    23: ("float4e2m1", 0.5),
}
"""Name and bytes of an element by TensorProto.DataType (onnx.proto3)."""

_LOOKUPS: Final = ("Gather", "GatherND", "GatherElements")

_BY_GROUPS: Final = "com.microsoft.MatMulNBits"
"""Its second input packs K x N weights, K and N being attributes."""

_SCALES: Final = {"QuantizeLinear": 1, "DequantizeLinear": 1, _BY_GROUPS: 2}
"""First of the inputs that are scales and zero points."""


@dataclass(frozen=True)
class Value:
    """A graph input or output; an axis is a number or the name of a dynamic one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Initializer:
    """A constant of the graph.

    ``looked_up``: only ever read by row, never as a whole. ``parameters``: weights of the model in it;
    scales and zero points hold none, and two of 4 bits may share an element.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    looked_up: bool
    parameters: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in memory, as stored."""
        width = next(width for name, width in ELEMENTS.values() if name == self.dtype)
        return math.ceil(self.elements * width)


@dataclass(frozen=True)
class OnnxGraph:
    """Summary of one ONNX file."""

    opset: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operators: Counter[str]
    initializers: tuple[Initializer, ...]

    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes of the constants by element type, largest first."""
        total: Counter[str] = Counter()
        for tensor in self.initializers:
            total[tensor.dtype] += tensor.bytes
        return dict(total.most_common())


def read_graph(path: Path) -> OnnxGraph:
    """Summarise an ONNX file; external data stays on the disk.

    Raises:
        BundleError: the file cannot be read or is no ONNX model.
    """
    try:
        with path.open("rb") as file:
            # Closed with its last view: what a traceback holds would forbid closing it here.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _model(memoryview(mapped))
    except (OSError, ValueError, BundleError) as error:
        raise BundleError(f"{path} cannot be read as ONNX: {error}") from error


def _model(data: memoryview) -> OnnxGraph:
    opset, graph = 0, None
    for number, value in fields(data):
        if number == 7:
            graph = message(value)
        elif number == 8:
            entry = dict(fields(message(value)))
            if not text(entry.get(1, 0)):
                version = entry.get(2, 0)
                opset = version if isinstance(version, int) else 0
    if graph is None:
        raise BundleError("it holds no graph: this is no ONNX model")
    return _graph(graph, opset)


def _graph(data: memoryview, opset: int) -> OnnxGraph:
    operators: Counter[str] = Counter()
    tensors: list[memoryview] = []
    inputs: list[Value] = []
    outputs: list[Value] = []
    by_row: set[str] = set()
    whole: set[str] = set()
    parameters: dict[str, int] = {}
    for number, value in fields(data):
        if number == 1:
            kind, names, attributes = _node(message(value))
            operators[kind] += 1
            if kind in _SCALES:
                parameters |= dict.fromkeys(names[_SCALES[kind] :], 0)
            if kind == _BY_GROUPS:
                parameters[names[1]] = attributes["K"] * attributes["N"]
            if kind in _LOOKUPS:
                by_row.add(names.pop(0))
            whole.update(names)
        elif number == 5:
            tensors.append(message(value))
        elif number == 11:
            inputs.append(_value(message(value)))
        elif number == 12:
            outputs.append(_value(message(value)))
    constants = tuple(_initializer(tensor, by_row - whole, parameters) for tensor in tensors)
    return OnnxGraph(opset, tuple(inputs), tuple(outputs), operators, constants)


def _node(data: memoryview) -> tuple[str, list[str], dict[str, int]]:
    """Operator, names of its inputs, and its attributes that are integers."""
    kind, inputs, domain = "", [], ""
    attributes: dict[str, int] = {}
    for number, value in fields(data):
        if number == 1:
            inputs.append(text(value))
        elif number == 4:
            kind = text(value)
        elif number == 5:
            attribute = dict(fields(message(value)))
            if isinstance(integer := attribute.get(3), int):
                attributes[text(attribute[1])] = integer
        elif number == 7:
            domain = text(value)
    return f"{domain}.{kind}" if domain else kind, inputs, attributes


def _initializer(data: memoryview, by_row: set[str], parameters: Mapping[str, int]) -> Initializer:
    shape: list[int] = []
    name, dtype = "", 0
    for number, value in fields(data):
        if number == 1:
            shape += packed(value)
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 8:
            name = text(value)
    held = parameters.get(name, math.prod(shape))
    return Initializer(name, _dtype(dtype), tuple(shape), name in by_row, held)


def _value(data: memoryview) -> Value:
    entry = dict(fields(data))
    tensor = dict(fields(message(dict(fields(message(entry[2])))[1])))
    axes: list[int | str] = []
    for number, value in fields(message(tensor[2])) if 2 in tensor else ():
        if number == 1:
            axis = dict(fields(message(value)))
            size = axis.get(1)
            axes.append(size if isinstance(size, int) else text(axis.get(2, 0)) or "?")
    kind = tensor.get(1, 0)
    return Value(text(entry[1]), _dtype(kind if isinstance(kind, int) else 0), tuple(axes))


def _dtype(number: int) -> str:
    if number not in ELEMENTS:
        raise BundleError(f"element type {number} of ONNX is not known here; known are {sorted(ELEMENTS)}")
    return ELEMENTS[number][0]


def matrix_product_model(rows: int | str, inner: int, columns: int, element: int = 1) -> bytes:
    """An ONNX model C[rows, columns] = A[rows, inner] @ B[inner, columns], to measure a ceiling.

    Args:
        rows: a number, or the name of an axis whose length is given later.
        inner: length of the products.
        columns: of the second factor.
        element: type of all three, a key of ``ELEMENTS``.
    """
    shapes: dict[str, tuple[int | str, ...]] = {
        "A": (rows, inner),
        "B": (inner, columns),
        "C": (rows, columns),
    }
    node = b"".join(encode(*field) for field in ((1, "A"), (1, "B"), (2, "C"), (4, "MatMul")))
    graph = encode(1, node) + encode(2, "product")
    graph += b"".join(
        encode(12 if name == "C" else 11, _typed(name, shape, element)) for name, shape in shapes.items()
    )
    return encode(1, 8) + encode(7, graph) + encode(8, encode(2, 13))


def _typed(name: str, shape: tuple[int | str, ...], element: int) -> bytes:
    """A ValueInfoProto; an axis is a number (field 1) or a name (field 2)."""
    axes = b"".join(encode(1, encode(2 if isinstance(size, str) else 1, size)) for size in shape)
    return encode(1, name) + encode(2, encode(1, encode(1, element) + encode(2, axes)))
