"""What an ONNX file says of itself."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from diagd.bundle.manifest import GraphWeights
from diagd.errors import BundleError
from diagd.export.onnx_file import read_onnx


@pytest.fixture
def model(tmp_path: Path) -> onnx.ModelProto:
    table = numpy_helper.from_array(np.ones((7, 4), np.float16), "table")
    weight = numpy_helper.from_array(np.ones((4, 3), np.float16), "weight")
    scale = numpy_helper.from_array(np.array(0.5, np.float32), "scale")
    tied = numpy_helper.from_array(np.ones((5, 3), np.float16), "tied")
    packed = helper.make_tensor("four", TensorProto.INT4, [3], [1, 2, 3])
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weight"], ["product"]),
        helper.make_node("FusedThing", ["product", "scale"], ["fused"], domain="com.example"),
        helper.make_node("Gather", ["tied", "ids"], ["embedded"]),
        helper.make_node("Transpose", ["tied"], ["head"]),
        helper.make_node("MatMul", ["fused", "head"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT32, ["W"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT16, ["W", 5])],
        [table, weight, scale, packed, tied],
    )
    opsets = [helper.make_opsetid("com.example", 7), helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opsets)


def test_summary_equals_what_onnx_reads(model: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    graph = read_onnx(tmp_path / "m.onnx")
    assert graph.opset == 23
    assert graph.operators == Counter({"Gather": 2, "MatMul": 2, "com.example.FusedThing": 1, "Transpose": 1})
    assert [(v.name, v.dtype, v.shape) for v in graph.inputs] == [("ids", "int32", ("W",))]
    assert [(v.name, v.dtype, v.shape) for v in graph.outputs] == [("out", "float16", ("W", 5))]
    found = {t.name: (t.dtype, t.shape, t.bytes, t.looked_up) for t in graph.initializers}
    assert found == {
        "table": ("float16", (7, 4), 56, True),
        "weight": ("float16", (4, 3), 24, False),
        "scale": ("float32", (), 4, False),
        "four": ("int4", (3,), 2, False),
        "tied": ("float16", (5, 3), 30, False),
    }
    assert graph.bytes_by_dtype() == {"float16": 110, "float32": 4, "int4": 2}
    assert graph.weights == GraphWeights(files=("w.bin",), streamed=60, looked_up=56)
    assert graph.weights.bytes == 116


def test_weights_in_the_file_itself_need_no_other(model: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "m.onnx")
    assert read_onnx(tmp_path / "m.onnx").weights == GraphWeights(files=(), streamed=60, looked_up=56)


def test_damage_is_told(model: onnx.ModelProto, tmp_path: Path) -> None:
    content = model.SerializeToString()
    broken = {
        "empty": b"",
        "text": b"this is a text",
        "cut": content[: len(content) // 2],
        "no graph": b"\x08\x0a",
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BundleError):
            read_onnx(tmp_path / name)
    with pytest.raises(BundleError, match="No such file or directory; check the path"):
        read_onnx(tmp_path / "absent")


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "any").write_bytes(data)
        try:
            read_onnx(Path(folder) / "any")
        except BundleError as error:
            assert "cannot be read as ONNX" in str(error)
