"""The nodes that stand for one quantised product, by scheme and form.

On the CPU static activations are uint8 with zero point 128, which is the same arithmetic as int8 with zero
point 0 and the faster product on every x86 with VNNI or AMX; TensorRT takes int8 with zero point 0 only.
Weight-only products are MatMulNBits on the CPU, which has no other quick kernel for them, and a
DequantizeLinear ahead of the product for TensorRT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Form
from diagd.calibration.encoding import (
    SMALLEST,
    column_limit,
    encode_columns,
    encode_groups,
    pad_groups,
    row_chunks,
)
from diagd.calibration.schemes import GROUP, Scheme
from diagd.calibration.weights_file import WeightsFile
from diagd.errors import UsageError

if TYPE_CHECKING:
    import onnx

Float = NDArray[np.float32]

INTEGER_ACCURACY = 4
"""MatMulNBits rounds activations to 8 bits by group; without it the product is 5 to 33 times slower."""

QUANTISED_OPSET, BLOCKED_OPSET = 19, 21
"""DequantizeLinear takes float16 scales from 19 on, blocks and 4 bits from 21 on."""

Product = tuple[list["onnx.NodeProto"], list["onnx.TensorProto"]]


class Weight(Protocol):
    """A matrix [K, N] that is read in blocks."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]

    def block(self, rows: slice, columns: slice = ...) -> Float:
        """float32 [rows, columns]."""
        ...


def check_form(form: Form, scheme: Scheme) -> bool:
    """Whether a graph of this form can have the scheme."""
    return form is Form.PREFIX or scheme.activation != "row"


def raise_opset(model: onnx.ModelProto, opset: int = BLOCKED_OPSET) -> None:
    """Declare at least an opset: from 18 on operators only gained types and attributes.

    TensorRT 10.3 documents opset 20, and 4 bits, which are of opset 21: no graph declares more than it needs.
    """
    from onnx import helper

    for entry in model.opset_import:
        if not entry.domain:
            entry.version = max(entry.version, opset)
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(model.opset_import, True))


def product_nodes(
    node: onnx.NodeProto,
    name: str,
    weight: Weight,
    limit: float | None,
    scheme: Scheme,
    form: Form,
    file: WeightsFile,
) -> Product:
    """Nodes and initializers in place of MatMul ``node``.

    Args:
        node: the product in floating point.
        name: of the weight; names of new values begin with it.
        weight: the matrix, migrated.
        limit: range of static activations.
        scheme: what to round to.
        form: of the graph.
        file: takes the weights.
    """
    if scheme.activation is None and form is Form.PREFIX:
        return _grouped(node, name, weight, 4 if scheme.weight == "int4" else 8, file)
    if scheme.weight == "int4":
        return _blocked(node, name, weight, file)
    tensors = _store_columns(name, weight, scheme, file)
    if scheme.activation == "row":
        return _scaled_by_row(node, name, tensors)
    nodes: list[onnx.NodeProto] = []
    x = node.input[0]
    if scheme.activation == "static":
        if limit is None:
            raise UsageError(f"{name} has no activation range: calibrate first")
        nodes, more, x = _rounded_input(x, name, limit, weight.dtype, scheme, form)
        tensors += more
    return [*nodes, *_dequantised(node, name, x, axis=1)], tensors


def _store_columns(name: str, weight: Weight, scheme: Scheme, file: WeightsFile) -> list[onnx.TensorProto]:
    """``NAME.q`` [K, N] and ``NAME.scale`` [N]."""
    from onnx import TensorProto

    reach = np.zeros(weight.shape[1], np.float32)
    for rows in row_chunks(weight.shape):
        reach = np.maximum(reach, np.abs(weight.block(rows)).max(axis=0))
    scale = np.maximum(reach, SMALLEST) / np.float32(column_limit(scheme.weight))
    scale = np.maximum(scale.astype(weight.dtype), np.finfo(weight.dtype).tiny)
    offset = file.begin()
    for rows in row_chunks(weight.shape):
        file.write(encode_columns(weight.block(rows), scale.astype(np.float32), scheme.weight))
    kind = TensorProto.FLOAT8E4M3FN if scheme.weight == "fp8" else TensorProto.INT8
    return [file.finish(f"{name}.q", offset, weight.shape, kind), file.add(f"{name}.scale", scale)]


def _dequantised(node: onnx.NodeProto, name: str, x: str, **attributes: Any) -> list[onnx.NodeProto]:
    from onnx import helper

    inputs = [f"{name}.q", f"{name}.scale"]
    dequantise = helper.make_node(
        "DequantizeLinear", inputs, [f"{name}.dq"], f"{name}/dequantise", **attributes
    )
    return [dequantise, helper.make_node("MatMul", [x, f"{name}.dq"], node.output, node.name)]


def _rounded_input(
    x: str, name: str, limit: float, dtype: np.dtype[Any], scheme: Scheme, form: Form
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]:
    from onnx import helper, numpy_helper

    scale = np.asarray(max(limit / column_limit(scheme.weight), float(np.finfo(dtype).tiny)), dtype)
    names = [f"{name}.x_scale", f"{name}.x_zero"]
    tensors = [numpy_helper.from_array(scale, names[0]), _zero_point(names[1], scheme, form)]
    nodes = [
        helper.make_node("QuantizeLinear", [x, *names], [f"{name}.x_q"], f"{name}/quantise_x"),
        helper.make_node("DequantizeLinear", [f"{name}.x_q", *names], [f"{name}.x_dq"], f"{name}/x"),
    ]
    return nodes, tensors, f"{name}.x_dq"


def _zero_point(name: str, scheme: Scheme, form: Form) -> onnx.TensorProto:
    from onnx import TensorProto, helper, numpy_helper

    if scheme.weight == "fp8":
        return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    zero = np.asarray(128, np.uint8) if form is Form.PREFIX else np.asarray(0, np.int8)
    tensor: onnx.TensorProto = numpy_helper.from_array(zero, name)
    return tensor


def _scaled_by_row(node: onnx.NodeProto, name: str, tensors: list[onnx.TensorProto]) -> Product:
    """Each row is divided by its largest magnitude / 127, so that no row depends on another."""
    from onnx import helper, numpy_helper

    def value(kind: str) -> str:
        return f"{name}.{kind}"

    constants: dict[str, NDArray[Any]] = {
        "axis": np.asarray([-1], np.int64),
        "first": np.asarray([0], np.int64),
        "second": np.asarray([1], np.int64),
        "levels": np.asarray(1 / 127, np.float32),
        "tiny": np.asarray(SMALLEST, np.float32),
        "one": np.asarray(1, np.float32),
        "zero": np.asarray(128, np.uint8),
    }
    tensors = [*tensors, *(numpy_helper.from_array(array, value(key)) for key, array in constants.items())]
    operations: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Abs", [node.input[0]], "magnitude", {}),
        ("ReduceMax", [value("magnitude"), value("axis")], "reduced", {"keepdims": 1}),
        # ONNX Runtime 1.31 keeps the reduced axis of an array without rows at its full size.
        ("Slice", [value("reduced"), value("first"), value("second"), value("axis")], "largest", {}),
        ("Max", [value("largest"), value("tiny")], "reach", {}),
        ("Mul", [value("reach"), value("levels")], "x_scale", {}),
        ("Div", [node.input[0], value("x_scale")], "x_scaled", {}),
        ("QuantizeLinear", [value("x_scaled"), value("one"), value("zero")], "x_q", {}),
        ("MatMulInteger", [value("x_q"), value("q"), value("zero")], "sum", {}),
        ("Cast", [value("sum")], "sum_float", {"to": 1}),
        ("Mul", [value("x_scale"), value("scale")], "step", {}),
    ]
    nodes = [
        helper.make_node(op, inputs, [value(output)], f"{name}/{output}", **attributes)
        for op, inputs, output, attributes in operations
    ]
    nodes.append(helper.make_node("Mul", [value("sum_float"), value("step")], node.output, node.name))
    return nodes, tensors


def _grouped(node: onnx.NodeProto, name: str, weight: Weight, bits: int, file: WeightsFile) -> Product:
    """MatMulNBits (com.microsoft): packed groups [N, groups, GROUP * bits / 8], scales [N, groups]."""
    from onnx import TensorProto, helper

    inputs, outputs = weight.shape
    groups = -(-inputs // GROUP)
    scales = np.empty((outputs, groups), np.float32)
    offset = file.begin()
    for columns in row_chunks((outputs, inputs)):
        integers, scale = encode_groups(pad_groups(weight.block(slice(None), columns)), bits)
        file.write(_packed(integers.transpose(2, 0, 1), bits))
        scales[columns] = scale.T
    shape = (outputs, groups, GROUP * bits // 8)
    tensors = [
        file.finish(f"{name}.q", offset, shape, TensorProto.UINT8),
        file.add(f"{name}.scale", scales),
    ]
    attributes: dict[str, Any] = {"K": inputs, "N": outputs, "bits": bits, "block_size": GROUP}
    product = helper.make_node(
        "MatMulNBits",
        [node.input[0], f"{name}.q", f"{name}.scale"],
        node.output,
        node.name,
        domain="com.microsoft",
        accuracy_level=INTEGER_ACCURACY,
        **attributes,
    )
    return [product], tensors


def _packed(integers: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Symmetric integers as unsigned ones, two 4-bit ones in a byte, the first in the low half."""
    unsigned: NDArray[np.uint8] = (integers.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 8:
        return unsigned
    packed: NDArray[np.uint8] = (unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)).astype(np.uint8)
    return packed


def _blocked(node: onnx.NodeProto, name: str, weight: Weight, file: WeightsFile) -> Product:
    """DequantizeLinear-21 of int4 [K, N], a scale for each ``GROUP`` rows and column."""
    from onnx import TensorProto

    scales, offset = [], file.begin()
    for rows in row_chunks(weight.shape, GROUP):
        block = weight.block(rows)
        integers, scale = encode_groups(pad_groups(block), bits=4)
        nibbles = (integers.reshape(-1, weight.shape[1])[: len(block)] & 0xF).astype(np.uint8).ravel()
        file.write(nibbles[0::2] | (nibbles[1::2] << 4))
        scales.append(scale)
    tensors = [
        file.finish(f"{name}.q", offset, weight.shape, TensorProto.INT4),
        file.add(f"{name}.scale", np.concatenate(scales).astype(weight.dtype)),
    ]
    return _dequantised(node, name, node.input[0], axis=0, block_size=GROUP), tensors
