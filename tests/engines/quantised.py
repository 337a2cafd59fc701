"""Step graphs with quantised matrices, as small as they can be: round to nearest, one scale a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BLOCK = 32
TYPES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "int4": TensorProto.INT4}
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}


def quantise(source: Path, target: Path, kind: str) -> int:
    """Quantise every product with a constant matrix; returns how many there are.

    ``int8`` and ``fp8`` also round the activations; ``int4`` is for the weights only, in blocks of 32.
    """
    model = onnx.load(source)
    matrices = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in matrices:
            nodes += _quantised_product(model.graph, node, matrices[node.input[1]], kind)
            count += 1
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)
    return count


def _quantised_product(
    graph: onnx.GraphProto, node: onnx.NodeProto, matrix: onnx.TensorProto, kind: str
) -> list[onnx.NodeProto]:
    values = numpy_helper.to_array(matrix).astype(np.float32)
    name = f"{node.output[0]}.{kind}"
    blocks = values.reshape(-1, BLOCK if kind == "int4" else len(values), values.shape[1])
    scale = np.abs(blocks).max(1) / LARGEST[kind] + 1e-6
    integers = (blocks / scale[:, None]).reshape(values.shape)
    if kind != "fp8":
        integers = np.rint(integers)
    tensor = helper.make_tensor(f"{name}.weight", TYPES[kind], values.shape, integers.reshape(-1).tolist())
    scale = scale if kind == "int4" else scale[0]
    graph.initializer.extend([tensor, numpy_helper.from_array(scale.astype(np.float16), f"{name}.scale")])
    block: dict[str, Any] = {"block_size": BLOCK, "axis": 0} if kind == "int4" else {"axis": 1}
    nodes = [helper.make_node("DequantizeLinear", [f"{name}.weight", f"{name}.scale"], [name], **block)]
    if kind != "int4":
        graph.initializer.extend(
            [
                numpy_helper.from_array(np.array(4.0 / LARGEST[kind], np.float16), f"{name}.step"),
                helper.make_tensor(f"{name}.zero", TYPES[kind], (), [0]),
            ]
        )
        step = [f"{name}.step", f"{name}.zero"]
        nodes += [
            helper.make_node("QuantizeLinear", [node.input[0], *step], [f"{name}.rounded"]),
            helper.make_node("DequantizeLinear", [f"{name}.rounded", *step], [f"{name}.input"]),
        ]
        node.input[0] = f"{name}.input"
    node.input[1] = name
    return nodes
