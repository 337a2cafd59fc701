"""A step graph with quantised products, and its weights file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Form
from diagd.calibration.nodes import product_nodes, raise_opset
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


class ScaledWeight:
    """A stored weight [K, N] with factors of its rows and columns, read in blocks.

    Args:
        stored: float matrix.
        rows: float32 [K], multiplied.
        columns: float32 [N], divided by.
    """

    def __init__(self, stored: Array, rows: Float | None = None, columns: Float | None = None) -> None:
        self.shape: tuple[int, int] = stored.shape
        self.dtype = stored.dtype
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
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        stored: StoredWeights,
        form: Form,
        scheme: Scheme,
        choices: Mapping[str, Choice],
        weights: WeightsFile,
    ) -> None:
        self._model, self._stored, self._form, self._scheme = model, stored, form, scheme
        self._choices, self._weights = choices, weights
        self._nodes = {node.name: node for node in model.graph.node}

    def run(self, advance: Callable[[int], None] = lambda _: None) -> None:
        """Rewrite every chosen product; ``advance`` is told the products done."""
        found = projections(self._model)
        raise_opset(self._model)
        divisors = self._fold(found)
        replacements: dict[str, list[onnx.NodeProto]] = {}
        for projection in found:
            choice = self._choices.get(projection.name)
            columns = divisors.get(projection.name)
            factors = choice.factors if choice else None
            weight = ScaledWeight(self._stored[projection.name], factors, columns)
            if choice is not None:
                replacements[projection.node] = self._quantise(projection, weight, choice)
            elif columns is not None:
                self._store_scaled(projection, weight)
            advance(1)
        self._replace(replacements)
        self._drop_unread()

    def _fold(self, found: list[Projection]) -> dict[str, Float]:
        """Put factors where they are absorbed; returns the divisors of columns, by projection."""
        outputs = {projection.name: projection.outputs for projection in found}
        divisors: dict[str, Float] = {}
        for projection in found:
            choice = self._choices.get(projection.name)
            if choice is None or choice.factors is None:
                continue
            if isinstance(projection.fold, NormFold):
                self._fold_norm(projection, projection.fold, choice.factors)
            elif isinstance(projection.fold, ColumnFold):
                fold = projection.fold
                target = divisors.setdefault(fold.projection, np.ones(outputs[fold.projection], np.float32))
                target[fold.start : fold.start + projection.inputs] *= choice.factors
        return divisors

    def _fold_norm(self, projection: Projection, fold: NormFold, factors: Float) -> None:
        from onnx import numpy_helper

        norm = self._nodes[fold.norm]
        for index, kind in enumerate(norm.input[1:], start=1):
            gain = self._stored[kind]
            name = f"{projection.name}.norm_{index}"
            divided = (gain.astype(np.float32) / factors).astype(gain.dtype)
            self._model.graph.initializer.append(numpy_helper.from_array(divided, name))
            norm.input[index] = name

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
