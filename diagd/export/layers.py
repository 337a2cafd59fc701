"""Layers that are alike but for their weights: one of them is traced, the others of a graph are copies of it.

Tracing takes a quarter of a second a layer, and copying next to nothing: a traced step that calls layers as
functions takes 22 ms a call (of twenty tensors). What is ahead of layers, a layer, and what is behind, traced
each by itself and chained for onnx_ir to inline, takes 63 lines more than copies do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diagd.export.known_graphs import described
from diagd.export.tracing import DOMAIN, placed

if TYPE_CHECKING:
    import onnx_ir as ir

END = "LayerEnd"
"""Operator behind each traced layer: of what it hands on, the residual stream and what that is to get."""

NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)|(?<=key_)\d+$|(?<=value_)\d+$")
"""Of a layer in the name of an input, an output or an initializer."""


def models(layers: int, matrices: Mapping[str, nn.Module]) -> list[int]:
    """The layer that each may be a copy of, itself where there is none: the first one like it.

    Nothing is added to the residual stream ahead of the first layer, which no other one is like. ``matrices``
    are modules in the place of matrices, by name.
    """
    parts: list[list[object]] = [[] for _ in range(layers)]
    for name, module in matrices.items():
        if (number := number_in(name)) is not None:
            parts[number].append([numbered(name, 0), described(module)])
    return [parts.index(part, min(layer, 1)) for layer, part in enumerate(parts)]


def number_in(name: str) -> int | None:
    """The layer that a name is of."""
    found = NUMBER.search(name)
    return int(found[0]) if found else None


def numbered(name: str, layer: int) -> str:
    """The name that another layer has for what has ``name`` in one."""
    return NUMBER.sub(str(layer), name)


def mark_ends(layers: Iterable[nn.Module]) -> None:
    """Have layers that are traced tell where they end, see ``repeat``."""
    for layer in layers:
        layer.register_forward_hook(_ended)


def _ended(_: nn.Module, inputs: object, given: tuple[Tensor, tuple[Tensor, ...]]) -> Any:
    tensors = (given[0], *given[1])
    dtypes, shapes = zip(*((tensor.dtype, tensor.shape) for tensor in tensors), strict=True)
    ends = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{END}", tensors, dtypes=dtypes, shapes=shapes, version=1
    )
    x, *addends = (placed(end, tensors) for end in ends)
    return x, tuple(addends)


def repeat(model: ir.Model, kinds: Sequence[int], inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """A graph of as many layers as ``kinds``, from that of one layer of each kind, in place.

    Args:
        model: traced of layers that tell where they end.
        kinds: the traced layer that each layer is a copy of; the first of both are the same.
        inputs: of the new graph, in order.
        outputs: likewise.
    """
    graph, copies = _Graph(model), [dict[Any, Any]()]
    carried: Sequence[ir.Value | None] = graph.ends[0].inputs
    for layer, kind in enumerate(kinds[1:], start=1):
        handed = dict(zip(graph.ends[kind - 1].outputs, carried, strict=True))
        copies.append(graph.copy(kind, layer, handed))
        carried = graph.given(graph.ends[kind], copies[-1], layer)
    _replace(graph.ends[-1].outputs, carried)
    named = {value.name: value for value in model.graph.outputs}
    found = []
    for name in outputs:
        layer = number_in(name) or 0
        value = named[numbered(name, kinds[layer])]
        found.append(copies[layer].get(value, value))
    model.graph.outputs[:] = found
    model.graph.inputs[:] = [graph.named[name] for name in inputs]
    graph.drop_traced()
    for name, value in zip(outputs, found, strict=True):
        value.name = name
    return model


class _Graph:
    """A traced graph and its layers.

    Attributes:
        ends: nodes that tell of ends.
        named: inputs and initializers.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model, self._graph = model, model.graph
        self._layers: list[list[ir.Node]] = [[]]
        self.ends: list[ir.Node] = []
        for node in model.graph:
            if (node.domain, node.op_type) == (DOMAIN, END):
                self.ends.append(node)
                self._layers.append([])
            else:
                self._layers[-1].append(node)
        self.named = {value.name or "": value for value in model.graph.inputs}
        self.named |= model.graph.initializers

    def copy(self, kind: int, layer: int, handed: Mapping[Any, Any]) -> dict[Any, Any]:
        """Add a copy of a traced layer; returns its values by those of the layer.

        ``handed``: what the layer ahead hands on, by what is handed to the traced one.
        """
        import onnx_ir as ir

        copied = dict(handed)
        for node in self._layers[kind]:
            copy = ir.Node(
                node.domain,
                node.op_type,
                self.given(node, copied, layer),
                node.attributes.values(),
                overload=node.overload,
                num_outputs=len(node.outputs),
                version=node.version,
                name=f"{node.name}.{layer}",
            )
            for value, new in zip(node.outputs, copy.outputs, strict=True):
                new.name, new.shape, new.type = f"{value.name}.{layer}", value.shape, value.type
                copied[value] = new
            self._graph.insert_before(self.ends[-1], copy)
        return copied

    def given(self, node: ir.Node, copied: Mapping[Any, ir.Value], layer: int) -> Sequence[ir.Value | None]:
        """Inputs of a node's copy."""
        return [copied[value] if value in copied else self._of_layer(value, layer) for value in node.inputs]

    def _of_layer(self, value: ir.Value | None, layer: int) -> ir.Value | None:
        """What stands in a layer for an input or a weight of another; other values stay."""
        import onnx_ir as ir

        if value is None or value.producer() is not None or value.const_value is not None:
            return value
        name = numbered(value.name or "", layer)
        if name not in self.named:
            self.named[name] = ir.Value(name=name, shape=value.shape, type=value.type)
            if value.is_initializer():
                self._graph.initializers[name] = self.named[name]
        return self.named[name]

    def drop_traced(self) -> None:
        """Leave out the layers that were copied, and what tells of ends."""
        from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

        _replace(self.ends[0].outputs, self.ends[0].inputs)
        RemoveUnusedNodesPass()(self._model)
        RemoveUnusedOpsetsPass()(self._model)


def _replace(values: Sequence[ir.Value], others: Sequence[ir.Value | None]) -> None:
    for value, other in zip(values, others, strict=True):
        assert other is not None
        value.replace_all_uses_with(other)
