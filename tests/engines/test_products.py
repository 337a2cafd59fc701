"""Products with constant weights on the processor, against NumPy and against their own nodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

from diagd.calibration.matrices import DequantisedMatrix, QuantisedMatrix, RowScaledMatrix
from diagd.engines.devices.kernels import register_host
from diagd.engines.host import instruction_sets
from diagd.export.tracing import Functions, save, trace
from diagd.export.weights import constant, store

Array = NDArray[Any]
SCALE, ZERO = np.float32(0.037), 117

pytestmark = pytest.mark.skipif(
    not {"avx512_vnni", "avx512vl"} <= instruction_sets(), reason="there is a kernel for AVX-512 VNNI alone"
)


def node_of(path: Path, inputs: Mapping[str, Array], constants: Mapping[str, Array]) -> Path:
    """A model of one product: of eight bits where it has scales, by row where it has none of the rows."""
    name = (
        "Int8Product"
        if "x_scale" in constants
        else "Int8ProductByRow"
        if "scale" in constants
        else "BoundProduct"
    )
    given = [
        helper.make_tensor_value_info(
            key, helper.np_dtype_to_tensor_dtype(value.dtype), ["rows", *value.shape[1:]]
        )
        for key, value in inputs.items()
    ]
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", "columns"])
    node = helper.make_node(name, [*inputs, *constants], ["y"], domain="diagd")
    weights = [numpy_helper.from_array(value, key) for key, value in constants.items()]
    graph = helper.make_graph([node], name, given, [result], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("diagd", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def opened(path: Path, threads: int = 1, level: str = "ORT_ENABLE_ALL", kernels: bool = True) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 4
    settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    if kernels:
        register_host(settings, threads)
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def example(rows: int, inputs: int, outputs: int, seed: int = 0) -> tuple[Array, dict[str, Array]]:
    random = np.random.default_rng(seed)
    x = random.normal(0, 3, (rows, inputs)).astype(np.float32)
    x[::2, ::3] = (
        random.integers(-300, 300, x[::2, ::3].shape) + np.float32(0.5)
    ) * SCALE  # halves, and clipped
    return x, {
        "q": random.integers(-127, 128, (inputs, outputs)).astype(np.int8),
        "scale": random.uniform(1e-3, 1e-2, outputs).astype(np.float32),
    }


def product(x: Array, weights: Mapping[str, Array], scale: Array, zero: int) -> Array:
    """In whole numbers, scaled in float32; ``scale`` [1, 1] or [rows, 1]."""
    rounded = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64) - zero
    total = rounded @ weights["q"].astype(np.int64)
    made: Array = total.astype(np.int32).astype(np.float32) * (scale * weights["scale"])
    return made


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 17), (64, 32), (130, 50), (256, 300)])
def test_products_are_exact(tmp_path: Path, inputs: int, outputs: int, threads: int) -> None:
    row, weights = example(1, inputs, outputs)
    fixed: dict[str, Array] = {"x_scale": np.array(SCALE), "x_zero": np.array(ZERO, np.uint8)}
    by_tensor, by_row = (
        opened(node_of(tmp_path / f"{len(more)}.onnx", {"x": row}, weights | more), threads)
        for more in (fixed, {})
    )
    for rows in (0, 1, 2, 13, 14, 15, 28, 29, 40):
        x = example(rows, inputs, outputs, seed=rows)[0]
        (found,) = by_tensor.run(None, {"x": x})
        np.testing.assert_array_equal(found, product(x, weights, np.full((1, 1), SCALE), ZERO))
        scale = np.maximum(np.abs(x).max(1, keepdims=True, initial=0), np.float32(1e-12)) * np.float32(
            1 / 127
        )
        (found,) = by_row.run(None, {"x": x})
        np.testing.assert_array_equal(found, product(x, weights, scale, 128))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 17), (64, 32), (130, 50), (256, 300)])
def test_rows_are_multiplied_whatever_is_beside_them(
    tmp_path: Path, inputs: int, outputs: int, threads: int
) -> None:
    random = np.random.default_rng(0)
    x, weight = (random.normal(0, 1, shape).astype(np.float32) for shape in ((40, inputs), (inputs, outputs)))
    session = opened(node_of(tmp_path / "a.onnx", {"x": x}, {"weight": weight}), threads)
    (all_of_them,) = session.run(None, {"x": x})
    bound = 1e-6 * (np.abs(x).astype(np.float64) @ np.abs(weight) + 1)
    assert (np.abs(all_of_them - x.astype(np.float64) @ weight) <= bound).all()
    for rows in (0, 1, 2, 7, 8, 13, 14, 15, 29):
        np.testing.assert_array_equal(session.run(None, {"x": x[:rows]})[0], all_of_them[:rows])
    x[3, 0] = np.nan
    (found,) = session.run(None, {"x": x})
    assert np.isnan(found[3]).all()
    np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(all_of_them, 3, 0))


class Product(nn.Module):
    def __init__(self, matrix: QuantisedMatrix) -> None:
        super().__init__()
        self.matrix = matrix
        self.functions = matrix.functions = Functions(None)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.matrix(x)
        return made


@pytest.mark.parametrize("by_row", [False, True], ids=["fixed ranges", "ranges of rows"])
def test_a_product_is_that_of_the_nodes_it_stands_for(tmp_path: Path, by_row: bool) -> None:
    x, weights = example(40, 96, 70)
    sources = {name: constant(value) for name, value in weights.items()}
    if by_row:
        matrix: QuantisedMatrix = RowScaledMatrix(70, sources)
    else:
        sources |= {"x_scale": constant(np.asarray(SCALE)), "x_zero": constant(np.asarray(128, np.uint8))}
        matrix = DequantisedMatrix(70, sources, kernel="Int8Product")
    module = Product(matrix)
    model = trace(
        module,
        (torch.empty(5, 96, device="meta"),),
        input_names=["x"],
        output_names=["y"],
        opset=21,
        dynamic_shapes=({0: "W"},),
        functions=module.functions,
    )
    tensors = store(tmp_path / "a.bin", {f"matrix.{name}": source for name, source in sources.items()})
    save(model, tensors, path := tmp_path / "a.onnx")
    x[3] = 0
    (found,) = opened(path).run(None, {"x": x})
    # What ONNX Runtime puts in the place of the nodes of rows rounds elsewhere.
    level = "ORT_ENABLE_BASIC" if by_row else "ORT_ENABLE_ALL"
    (wanted,) = opened(path, level=level, kernels=False).run(None, {"x": x})
    np.testing.assert_array_equal(found, wanted)
    x[5, 7], x[6, 0] = np.nan, np.inf
    (found,) = opened(path).run(None, {"x": x})
    assert not by_row or not np.isfinite(found[5:7]).any()  # so that draws are refused
    np.testing.assert_array_equal(np.delete(found, [5, 6], 0), np.delete(wanted, [5, 6], 0))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    x, weights = example(3, 8, 4)
    wrong = [{**weights, "scale": weights["scale"][:3]}, {**weights, "q": weights["q"][:7]}]
    for number, constants in enumerate(wrong):
        session = opened(node_of(tmp_path / f"{number}.onnx", {"x": x}, constants))
        with pytest.raises(
            Exception, match="diagd: a product of tensors whose shapes"
        ):  # ONNX Runtime's own type
            session.run(None, {"x": x})
    with pytest.raises(Exception, match="diagd: a product of tensors whose shapes"):
        opened(node_of(tmp_path / "a.onnx", {"x": x}, {"weight": np.ones((7, 4), np.float32)})).run(
            None, {"x": x}
        )
    path = node_of(tmp_path / "fed.onnx", {"x": x, "q": weights["q"]}, {"scale": weights["scale"]})
    with pytest.raises(Exception, match="diagd: a product with a weight that is not constant"):
        opened(path)
