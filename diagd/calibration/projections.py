"""The matrix products of a step graph whose weight is constant: what quantisation is about."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from diagd.errors import UsageError, require

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]

NORMS = ("RMSNormalization", "LayerNormalization")


@dataclass(frozen=True)
class NormFold:
    """A factor of the input's channels goes into the gain (and shift) of node ``norm``."""

    norm: str


@dataclass(frozen=True)
class ColumnFold:
    """A factor of the input's channels goes into columns ``start``... of the weight ``projection``."""

    projection: str
    start: int


@dataclass(frozen=True)
class Projection:
    """One product x @ weight.

    Attributes:
        name: of the weight, [inputs, outputs] as stored.
        node: name of its MatMul node.
        activation: name of x.
        inputs, outputs: size of the weight.
        fold: what absorbs a factor of x's channels exactly; None where nothing does.
    """

    name: str
    node: str
    activation: str
    inputs: int
    outputs: int
    fold: NormFold | ColumnFold | None


def load_graph(path: Path) -> onnx.ModelProto:
    """A step graph without its weights."""
    package = require("onnx", extra="export", purpose="quantise a bundle")
    return cast("onnx.ModelProto", package.load(str(path), load_external_data=False))


def projections(model: onnx.ModelProto) -> list[Projection]:
    """Products with constant weights, in the order of the graph.

    Raises:
        UsageError: there is none.
    """
    weights = {i.name: i for i in model.graph.initializer if len(i.dims) == 2}
    links = _Links(model)
    found = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            inputs, outputs = weights[node.input[1]].dims
            fold = links.fold(node, weights)
            found.append(Projection(node.input[1], node.name, node.input[0], inputs, outputs, fold))
    if not found:
        raise UsageError("the graph has no product with a constant weight: it is quantised already")
    return found


class _Links:
    """Who makes and who reads each value of a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._vectors = {t.name: list(t.dims) for t in model.graph.initializer if len(t.dims) == 1}
        self._makers = {output: node for node in model.graph.node for output in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self._readers[name].append(node)

    def fold(self, product: onnx.NodeProto, weights: dict[str, Any]) -> NormFold | ColumnFold | None:
        """What can absorb a factor of the product's input channels."""
        value = product.input[0]
        maker = self._only_maker(value)
        while maker is not None and maker.op_type in ("Gather", "Cast"):  # rows are picked, channels stay
            maker = self._only_maker(maker.input[0])
        if maker is None:
            return None
        if maker.op_type in NORMS or (maker.op_type == "Mul" and self._has_gain(maker, product, weights)):
            return NormFold(maker.name)
        if maker.op_type == "Mul":
            return self._column_fold(maker, weights)
        return None

    def _has_gain(self, multiply: onnx.NodeProto, product: onnx.NodeProto, weights: dict[str, Any]) -> bool:
        """Whether a product of elements has a constant for each channel: a norm that is spelled out."""
        channels = list(weights[product.input[1]].dims[:1])
        return any(self._vectors.get(name) == channels for name in multiply.input)

    def _only_maker(self, value: str) -> onnx.NodeProto | None:
        return self._makers.get(value) if len(self._readers[value]) == 1 else None

    def _column_fold(self, multiply: onnx.NodeProto, weights: dict[str, Any]) -> ColumnFold | None:
        for factor in multiply.input:
            split = self._only_maker(factor)
            if split is None or split.op_type != "Split":
                continue
            maker = self._only_maker(split.input[0])
            if maker is None or maker.op_type != "MatMul" or maker.input[1] not in weights:
                continue
            width = weights[maker.input[1]].dims[1] // len(split.output)
            return ColumnFold(maker.input[1], list(split.output).index(factor) * width)
        return None


class StoredWeights:
    """Initializers of a graph, mapped from its weights files, never read whole.

    Args:
        model: from ``load_graph``.
        directory: the graph lies in.
    """

    def __init__(self, model: onnx.ModelProto, directory: Path) -> None:
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._directory = directory

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Array:
        """The tensor, a read-only map of its file where it lies in one."""
        from onnx import helper, numpy_helper

        tensor = self._tensors[name]
        if not tensor.external_data:
            array: Array = numpy_helper.to_array(tensor)
            return array
        where = {entry.key: entry.value for entry in tensor.external_data}
        return np.memmap(
            self._directory / where["location"],
            dtype=helper.tensor_dtype_to_np_dtype(tensor.data_type),
            mode="r",
            offset=int(where.get("offset", 0)),
            shape=tuple(tensor.dims),
        )
