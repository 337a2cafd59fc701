"""A step graph with quantised products, and its weights file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Form
from diagd.calibration.encoding import row_chunks
from diagd.calibration.half import to_half
from diagd.calibration.nodes import BLOCKED_OPSET, QUANTISED_OPSET, product_nodes, raise_opset
from diagd.calibration.projections import (
    Array,
    ColumnFold,
    NormFold,
    Projection,
    StoredWeights,
    projections,
)
from diagd.calibration.schemes import Scheme
from diagd.calibration.search import Choice
from diagd.calibration.weights_file import WeightsFile

if TYPE_CHECKING:
    import onnx

Float = NDArray[np.float32]

_FLOAT16 = 10
"""``TensorProto.FLOAT16``"""


class ScaledWeight:
    """A stored weight [K, N] with factors of its rows and columns, read in blocks.

    Args:
        stored: float matrix.
        dtype: of what is computed with it.
        rows: float32 [K], multiplied.
        columns: float32 [N], divided by.
    """

    def __init__(
        self,
        stored: Array,
        dtype: np.dtype[Any],
        rows: Float | None = None,
        columns: Float | None = None,
    ) -> None:
        self.shape: tuple[int, int] = stored.shape
        self.dtype = dtype
        self._stored, self._rows, self._columns = stored, rows, columns

    def block(self, rows: slice, columns: slice = slice(None)) -> Float:
        """float32 [rows, columns]."""
        block = np.asarray(self._stored[rows, columns], np.float32)
        if self._rows is not None:
            block = block * self._rows[rows, None]
        return block if self._columns is None else block / self._columns[columns]


class Rewriter:
    """Quantises the products of one graph.

    Args:
        model: from ``load_graph``; changed in place.
        stored: its weights.
        form: of the graph; says which operators it may use.
        scheme: what to quantise to.
        choices: by projection; those without stay in floating point.
        weights: file to append to.
        half: compute in float16 what stays in floating point, where the graph has float32.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        stored: StoredWeights,
        form: Form,
        scheme: Scheme,
        choices: Mapping[str, Choice],
        weights: WeightsFile,
        *,
        half: bool = False,
    ) -> None:
        self._model, self._stored, self._form, self._scheme = model, stored, form, scheme
        self._choices, self._weights = choices, weights
        self._halved = to_half(model) if half else frozenset[str]()
        self._nodes = {node.name: node for node in model.graph.node}

    def run(self, advance: Callable[[int], None] = lambda _: None) -> None:
        """Rewrite every chosen product; ``advance`` is told the products done."""
        found = projections(self._model)
        blocked = self._scheme.weight == "int4" and self._form is not Form.PREFIX
        raise_opset(self._model, BLOCKED_OPSET if blocked else QUANTISED_OPSET)
        divisors = self._fold(found)
        replacements: dict[str, list[onnx.NodeProto]] = {}
        for projection in found:
            choice = self._choices.get(projection.name)
            columns = divisors.get(projection.name)
            factors = choice.factors if choice else None
            stored = self._stored[projection.name]
            weight = ScaledWeight(stored, self._dtype(projection.name, stored), factors, columns)
            if choice is not None:
                replacements[projection.node] = self._quantise(projection, weight, choice)
            elif columns is not None:
                self._store_scaled(projection, weight)
            advance(1)
        self._replace(replacements)
        self._drop_unread()
        self._store_halves()

    def _dtype(self, name: str, stored: Array) -> np.dtype[Any]:
        """What the graph reads a stored tensor as."""
        return np.dtype(np.float16) if name in self._halved else stored.dtype

    def _fold(self, found: list[Projection]) -> dict[str, Float]:
        """Put factors where they are absorbed; returns the divisors of columns, by projection."""
        outputs = {projection.name: projection.outputs for projection in found}
        divisors: dict[str, Float] = {}
        for projection in found:
            choice = self._choices.get(projection.name)
            if choice is None or choice.factors is None:
                continue
            if projection.fold is None:
                self._divide_input(projection, choice.factors)
            elif isinstance(projection.fold, NormFold):
                self._fold_norm(projection, projection.fold, choice.factors)
            elif isinstance(projection.fold, ColumnFold):
                fold = projection.fold
                target = divisors.setdefault(fold.projection, np.ones(outputs[fold.projection], np.float32))
                target[fold.start : fold.start + projection.inputs] *= choice.factors
        return divisors

    def _fold_norm(self, projection: Projection, fold: NormFold, factors: Float) -> None:
        """Divide the gain and the shift of a norm, or of a product with a gain."""
        from onnx import numpy_helper

        norm = self._nodes[fold.norm]
        tensors = {tensor.name: tensor for tensor in self._model.graph.initializer}
        for index, kind in enumerate(norm.input):
            if kind not in tensors or list(tensors[kind].dims) != [projection.inputs]:
                continue
            gain = numpy_helper.to_array(tensors[kind]) if kind not in self._stored else self._stored[kind]
            name = f"{projection.name}.norm_{index}"
            divided = (gain.astype(np.float32) / factors).astype(self._dtype(kind, gain))
            self._model.graph.initializer.append(numpy_helper.from_array(divided, name))
            norm.input[index] = name

    def _divide_input(self, projection: Projection, factors: Float) -> None:
        """A product with the reciprocals, where the form leaves nothing to absorb them."""
        from onnx import helper, numpy_helper

        node, name = self._nodes[projection.node], f"{projection.name}.migrated"
        dtype = self._dtype(projection.name, self._stored[projection.name])
        reciprocals = numpy_helper.from_array((1 / factors).astype(dtype), f"{name}.factors")
        self._model.graph.initializer.append(reciprocals)
        divide = helper.make_node("Mul", [node.input[0], reciprocals.name], [name], name)
        self._model.graph.node.insert(list(self._model.graph.node).index(node), divide)
        node.input[0] = name

    def _store_scaled(self, projection: Projection, weight: ScaledWeight) -> None:
        """A float copy of a weight whose columns absorbed the factors of another product."""
        name = f"{projection.name}.scaled"
        scaled = weight.block(slice(None)).astype(weight.dtype)
        self._model.graph.initializer.append(self._weights.add(name, scaled))
        self._nodes[projection.node].input[1] = name

    def _quantise(self, projection: Projection, weight: ScaledWeight, choice: Choice) -> list[onnx.NodeProto]:
        node = self._nodes[projection.node]
        nodes, tensors = product_nodes(
            node, projection.name, weight, choice.limit, self._scheme, self._form, self._weights
        )
        self._model.graph.initializer.extend(tensors)
        return nodes

    def _replace(self, replacements: Mapping[str, list[onnx.NodeProto]]) -> None:
        graph = self._model.graph
        nodes = [new for node in graph.node for new in replacements.get(node.name, [node])]
        del graph.node[:]
        graph.node.extend(nodes)
        if any(node.domain == "com.microsoft" for node in nodes):
            self._model.opset_import.add(domain="com.microsoft", version=1)

    def _drop_unread(self) -> None:
        graph = self._model.graph
        read = {name for node in graph.node for name in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.initializer[:]
        graph.initializer.extend(kept)

    def _store_halves(self) -> None:
        """Float16 copies of the weights that stay in floating point."""
        graph = self._model.graph
        for index, tensor in enumerate(graph.initializer):
            if tensor.name not in self._halved:
                continue
            stored = self._stored[tensor.name]
            offset = self._weights.begin()
            for rows in row_chunks(stored.shape) if stored.ndim == 2 else [slice(None)]:
                self._weights.write(stored[rows].astype(np.float16))
            half = self._weights.finish(tensor.name, offset, stored.shape, _FLOAT16)
            graph.initializer[index].CopyFrom(half)
