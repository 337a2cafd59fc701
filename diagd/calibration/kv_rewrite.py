"""A step graph whose K/V rows are rounded to 8 bits.

The portable form gets int8 buffers, read through a DequantizeLinear of scale 1. Scores are products of
queries and keys, so the scales of keys multiply the queries; those of values multiply what attention returns:
no work of a channel grows with the cache. The prefix form keeps its buffers and rounds the rows it writes,
which comes to the same predictions: that is the graph which the gate judges.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Form
from diagd.calibration.kv_cache import cache_rows
from diagd.calibration.nodes import raise_opset
from diagd.errors import BundleError

if TYPE_CHECKING:
    import onnx

Float = NDArray[np.float32]

VIEWS = ("Squeeze", "Unsqueeze", "Transpose")


def quantise_cache(model: onnx.ModelProto, form: Form, scales: Mapping[str, Float]) -> None:
    """Round the K/V rows of a graph, in place.

    Args:
        model: from ``load_graph``; weights may be quantised already.
        form: ``prefix`` or ``portable``.
        scales: float32 [G, D] by K/V tensor, from ``row_scales``.

    Raises:
        BundleError: attention is not as the exporter writes it.
    """
    edit = _CacheEdit(model)
    if form is Form.PREFIX:
        for name, value in cache_rows(model).items():
            edit.round_written(name, value, scales[name])
    else:
        raise_opset(model)
        for name, scale in scales.items():
            edit.store_as_integers(name, scale)
    edit.insert()


class _CacheEdit:
    """New nodes of a graph, each behind the node that makes its input."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import helper

        self._graph = model.graph
        self._makers = {output: node for node in self._graph.node for output in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self._graph.node:
            for value in node.input:
                self._readers[value].append(node)
        self._followers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        past = next(value for value in self._graph.input if value.name == "past_key_0")
        self._dtype = np.dtype(helper.tensor_dtype_to_np_dtype(past.type.tensor_type.elem_type))
        self._constant("kv.unit", np.ones((), self._dtype))
        self._constant("kv.zero", np.zeros((), np.int8))

    def round_written(self, name: str, value: str, scale: Float) -> None:
        """Rows [W, G, D] are rounded on their way into the buffer."""
        scale_name = self._constant(f"kv.{name}.scale", scale.astype(self._dtype))
        rounded = self._rounded(name, value, scale_name)
        result = self._follow("Mul", [rounded, scale_name], f"kv.{name}.written")
        for node in self._readers[value]:
            if node.op_type == "ScatterND":
                _replace_input(node, value, result)

    def store_as_integers(self, name: str, scale: Float) -> None:
        """The buffer [1, G, S, D] and the new rows are int8; attention runs over integers."""
        from onnx import TensorProto

        past, rows = f"past_{name}", self._rows_of(f"new_{name}")
        scale_name = self._constant(f"kv.{name}.scale", scale[:, None].astype(self._dtype))
        readers = list(self._readers[past])
        read = self._dequantised(past, f"kv.{name}.past")
        for node in readers:
            _replace_input(node, past, read)
        product = self._product(past)
        if name.startswith("key"):
            self._multiply(product.input[0], scale_name, f"kv.{name}.query")
        else:
            (total,) = self._readers[product.output[0]]
            self._multiply(total.output[0], scale_name, f"kv.{name}.attended")
        self._store_rows(name, rows, scale_name)
        for value in (*self._graph.input, *self._graph.output):
            if value.name in (past, f"new_{name}"):
                value.type.tensor_type.elem_type = TensorProto.INT8

    def insert(self) -> None:
        """Put the new nodes into the graph, in an order that can be run."""
        nodes: list[onnx.NodeProto] = []

        def add(values: list[str]) -> None:
            for value in values:
                for node in self._followers.pop(value, []):
                    nodes.append(node)
                    add(list(node.output))

        add([value.name for value in self._graph.input])
        for node in self._graph.node:
            nodes.append(node)
            add(list(node.output))
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _rows_of(self, output: str) -> str:
        """The value [G, W, D] that an output [1, G, W, D] shows."""
        maker = self._makers.get(output)
        if maker is None or maker.op_type != "Unsqueeze":
            raise BundleError(f"the graph does not make '{output}' of its rows: export the bundle again")
        rows: str = maker.input[0]
        return rows

    def _product(self, value: str) -> onnx.NodeProto:
        """The product that a buffer goes into."""
        for node in self._readers[value]:
            if node.op_type == "MatMul":
                return node
            if node.op_type in VIEWS:
                return self._product(node.output[0])
        raise BundleError(f"the graph does not attend to '{value}': export the bundle again")

    def _store_rows(self, name: str, rows: str, scale: str) -> None:
        """Rows leave as integers, and the step attends to what was rounded."""
        readers = list(self._readers[rows])
        rounded = self._rounded(name, rows, scale)
        for node in readers:
            leaves = node.op_type == "Unsqueeze"
            _replace_input(node, rows, f"kv.{name}.integers" if leaves else rounded)

    def _rounded(self, name: str, rows: str, scale: str) -> str:
        scaled = self._follow("Div", [rows, scale], f"kv.{name}.scaled")
        integers = self._follow("QuantizeLinear", [scaled, "kv.unit", "kv.zero"], f"kv.{name}.integers")
        return self._dequantised(integers, f"kv.{name}.rounded")

    def _dequantised(self, integers: str, output: str) -> str:
        # No zero point is named: ONNX Runtime 1.31 gives nodes that it moves one of another type.
        return self._follow("DequantizeLinear", [integers, "kv.unit"], output)

    def _multiply(self, value: str, factor: str, result: str) -> None:
        """Everything that read a value reads it multiplied."""
        readers = list(self._readers[value])
        self._follow("Mul", [value, factor], result)
        for node in readers:
            _replace_input(node, value, result)

    def _follow(self, kind: str, inputs: list[str], output: str) -> str:
        from onnx import helper

        self._followers[inputs[0]].append(helper.make_node(kind, inputs, [output], output))
        return output

    def _constant(self, name: str, array: NDArray[Any]) -> str:
        from onnx import numpy_helper

        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name


def _replace_input(node: onnx.NodeProto, old: str, new: str) -> None:
    for index, value in enumerate(node.input):
        if value == old:
            node.input[index] = new
