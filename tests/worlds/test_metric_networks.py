from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from diagd.errors import UsageError
from worlds.metrics import MetricNetwork

RANDOM = np.random.default_rng(0)
CLIPS = RANDOM.integers(0, 256, (20, 3, 4, 5, 3), dtype=np.uint8)


def write(path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, list[str | int]], rank: int) -> Path:
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * rank)
    graph = helper.make_graph(nodes, "metric", given, [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def mean(axes: list[int]) -> list[onnx.NodeProto]:
    return [helper.make_node("ReduceMean", ["x"], ["out"], axes=axes, keepdims=0)]


def test_features_of_frames_and_clips(tmp_path: Path) -> None:
    scaled = CLIPS / 255
    frames = MetricNetwork(write(tmp_path / "f.onnx", mean([2, 3]), {"x": ["n", 3, "h", "w"]}, 2))
    np.testing.assert_allclose(frames.features(CLIPS), scaled.mean((2, 3)).reshape(60, 3), rtol=1e-5)
    clips = MetricNetwork(write(tmp_path / "c.onnx", mean([2, 3, 4]), {"x": ["n", 3, "t", "h", "w"]}, 2))
    assert clips.takes_clips
    np.testing.assert_allclose(clips.features(CLIPS), scaled.mean((1, 2, 3)), rtol=1e-5)


def test_distances_of_pairs(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Sub", ["a", "b"], ["d"]),
        helper.make_node("Abs", ["d"], ["e"]),
        helper.make_node("ReduceMean", ["e"], ["out"], axes=[1, 2, 3], keepdims=1),
    ]
    shape: list[str | int] = ["n", 3, "h", "w"]
    network = MetricNetwork(write(tmp_path / "d.onnx", nodes, {"a": shape, "b": list(shape)}, 4))
    assert network.takes_pairs
    expected = np.abs(CLIPS / 255 - CLIPS[::-1] / 255).mean((2, 3, 4))
    np.testing.assert_allclose(network.distances(CLIPS, CLIPS[::-1]), expected, rtol=1e-5)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such network"):
        MetricNetwork(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("not a network")
    with pytest.raises(UsageError, match="cannot be loaded"):
        MetricNetwork(tmp_path / "text.onnx")
    with pytest.raises(UsageError, match=r"rank \[2\]"):
        MetricNetwork(write(tmp_path / "flat.onnx", mean([1]), {"x": ["n", 3]}, 1))
