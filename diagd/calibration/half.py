"""A float32 step graph of a GPU form in float16, as the exporter traces it where it is asked to.

TensorRT has fused attention for float16 only. What the logits and the K/V rows depend on becomes float16; the
logits, the sampler and the statistics of a norm that is spelled out stay float32, for a sum of squares would
leave the range of float16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from diagd.errors import BundleError

if TYPE_CHECKING:
    import onnx

LOGITS = "logits"
CACHE = ("past_", "present_", "new_")
UNTYPED = ("Constant", "ConstantOfShape")
"""Operators that make a type of their own; the exporter folds them into initializers."""


def to_half(model: onnx.ModelProto) -> frozenset[str]:
    """Change the types of a ``modern`` or ``portable`` graph in place, casting where they meet.

    Args:
        model: from ``load_graph``, all its floating point float32.

    Returns:
        Weights, outside the graph, that it now reads as float16: they are still to be stored so.

    Raises:
        BundleError: the graph is not as the exporter writes it.
    """
    return _Conversion(model).run()


class _Conversion:
    """The nodes that compute in float16, and the casts between them and the others."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import TensorProto, shape_inference

        graph = model.graph
        self._graph = graph
        self._single, self._half = TensorProto.FLOAT, TensorProto.FLOAT16
        inferred = shape_inference.infer_shapes(model).graph
        values = (*inferred.input, *inferred.output, *inferred.value_info)
        self._floats = {v.name for v in values if v.type.tensor_type.elem_type == self._single}
        self._tensors = {t.name: t for t in graph.initializer if t.data_type == self._single}
        self._makers = {output: node for node in graph.node for output in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)
        cache = [v.name for v in graph.output if v.name.startswith(CACHE)]
        body = self._ancestors([LOGITS, *cache])
        self._halves = {node.name for node in body} - {n.name for n in self._norm_statistics(body)}
        self._before: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self._cast_values: set[str] = set()

    def run(self) -> frozenset[str]:
        """Convert; see ``to_half``."""
        made = {output for n in self._graph.node if n.name in self._halves for output in n.output}
        made |= {v.name for v in self._graph.input if v.name.startswith(CACHE)}
        stored: set[str] = set()
        for node in self._graph.node:
            is_half = node.name in self._halves
            if is_half:
                self._retype(node)
            for index, name in enumerate(node.input):
                if name in self._tensors and is_half:
                    node.input[index] = self._half_tensor(name, stored)
                elif name in self._floats and (name in made) != is_half:
                    node.input[index] = self._cast(name, node, to_half=is_half)
        self._cast_logits()
        self._insert_casts()
        del self._graph.value_info[:]  # of the types before
        for value in (*self._graph.input, *self._graph.output):
            if value.name.startswith(CACHE):
                value.type.tensor_type.elem_type = self._half
        return frozenset(stored)

    def _ancestors(self, values: Iterable[str]) -> list[onnx.NodeProto]:
        """Nodes that the values depend on."""
        wanted = set(values)
        found = []
        for node in reversed(self._graph.node):
            if wanted.intersection(node.output):
                found.append(node)
                wanted.update(node.input)
        return found

    def _norm_statistics(self, body: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """From the square of each norm's input to the product with its gain."""
        found = []
        for node in body:
            if node.op_type != "ReduceMean" or node.input[0] not in self._floats:
                continue
            found += [self._makers[node.input[0]], node]
            (last,) = self._readers[node.output[0]]
            while last.op_type in ("Add", "Sqrt", "Reciprocal"):
                found.append(last)
                (last,) = self._readers[last.output[0]]
            found.append(last)  # the input times the reciprocal root
            gain = self._readers[last.output[0]]
            found += [n for n in gain if n.op_type == "Mul" and set(n.input) & set(self._tensors)]
        return found

    def _retype(self, node: onnx.NodeProto) -> None:
        """Attributes that name a type."""
        if node.op_type in UNTYPED and node.output[0] in self._floats:
            raise BundleError(f"the graph makes '{node.output[0]}' itself: export the bundle again")
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == self._single:
                attribute.i = self._half

    def _half_tensor(self, name: str, stored: set[str]) -> str:
        """The initializer for float16 readers; small ones that others read as well are copied."""
        from onnx import numpy_helper

        tensor = self._tensors[name]
        if tensor.external_data:
            stored.add(name)
            return name
        result = f"{name}.half"
        if result not in self._makers:
            array = numpy_helper.to_array(tensor).astype(np.float16)
            self._graph.initializer.append(numpy_helper.from_array(array, result))
            self._makers[result] = self._graph.node[0]
        return result

    def _cast(self, name: str, reader: onnx.NodeProto, *, to_half: bool) -> str:
        """A cast of a value ahead of its first reader of the other type."""
        from onnx import helper

        result = f"{name}.{'half' if to_half else 'float'}"
        if result not in self._cast_values:
            self._cast_values.add(result)
            kind = self._half if to_half else self._single
            self._before[reader.name].append(helper.make_node("Cast", [name], [result], result, to=kind))
        return result

    def _cast_logits(self) -> None:
        """Logits leave in float32, for the sampler too."""
        from onnx import helper

        maker = self._makers[LOGITS]
        maker.output[0] = f"{LOGITS}.half"
        for node in self._graph.node:
            for index, name in enumerate(node.input):
                if name == f"{LOGITS}.float":
                    node.input[index] = LOGITS
        for casts in self._before.values():
            casts[:] = [cast for cast in casts if cast.input[0] != LOGITS]
        place = list(self._graph.node).index(maker) + 1
        cast = helper.make_node("Cast", list(maker.output), [LOGITS], f"{LOGITS}.float", to=self._single)
        self._graph.node.insert(place, cast)

    def _insert_casts(self) -> None:
        nodes = [n for node in self._graph.node for n in (*self._before.get(node.name, []), node)]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
