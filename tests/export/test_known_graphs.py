"""Graphs that a machine keeps are those that would be traced, and no others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from packaging.version import Version

from diagd.bundle import Form, cache
from diagd.calibration.matrices import Weight, quantised_matrix
from diagd.calibration.options import SCHEMES
from diagd.export import known_graphs
from diagd.export.checkpoints import RandomCheckpoint
from diagd.export.exporter import TOKENIZER_FILES, write_tokenizer
from diagd.export.families.world import PatchGraphs
from diagd.export.known_graphs import KIND
from diagd.export.step_graph import StepVariant, trace_step
from diagd.export.tracing import trace
from diagd.progress import Progress
from diagd.schedule import StreamLayout
from tests.oracles.models import small_model

MATRIX = "transformer.layers.0.attention.out"
CONFIG = small_model(StreamLayout(2, 3), layers=1).config


class Traced(Exception):
    """The graph is not known."""


def tracing(*_: object, **__: object) -> None:
    raise Traced


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A cache with a graph alone, and what was traced."""
    folder, made = tmp_path_factory.mktemp("machine") / "cache", list[bytes]()

    def noted(*arguments: Any, **named: Any) -> ir.Model:
        model: ir.Model = trace(*arguments, **named)
        made.append(content(model))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_graphs, "trace", noted)
        patch.setenv("DIAGD_CACHE", str(folder))
        assert content(known()) == made[0]
    return folder, made[0]


@pytest.fixture
def place(first: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that cache; nothing more is traced."""

    monkeypatch.setattr(known_graphs, "trace", tracing)
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(first[0], tmp_path / "cache")


def content(model: ir.Model) -> bytes:
    """Everything of a graph as its file says it, weights left out."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        if value.name is not None and value.name.startswith("transformer."):
            value.const_value = None
    made: bytes = ir.to_proto(copy).SerializeToString(deterministic=True)
    return made


def known() -> ir.Model:
    return trace_step(CONFIG, Form.MODERN, capacity=64)


def test_a_known_graph_is_the_traced_one(first: tuple[Path, bytes], place: Path) -> None:
    assert cache.usage().entries == {KIND: 1}
    graph = known()
    assert content(graph) == first[1]
    initializers = graph.graph.initializers.items()
    weights = [value.const_value for name, value in initializers if name.startswith("transformer.")]
    assert weights == [None] * len(weights)
    assert len(weights) > 5


class _Fixed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[0] == 5 else x


def test_an_axis_that_code_fixes_is_no_dynamic_one() -> None:
    x = (torch.zeros(5, device="meta"),)
    where = r"\['x'\]" if Version(torch.__version__) < Version("2.14") else r"\[0\]"
    with pytest.raises(ValueError, match=rf"static shape of 5 for dimension inputs{where}\.shape\[0\]"):
        trace(_Fixed(), x, input_names=["x"], output_names=["y"], opset=20, dynamic_shapes=({0: "W"},))


def test_whatever_a_graph_depends_on_makes_another(place: Path) -> None:
    known()
    whole: dict[str, Any] = {"config": CONFIG, "form": Form.MODERN, "capacity": 64}
    changes: list[dict[str, Any]] = [
        {"config": replace(CONFIG, norm_epsilon=1e-3)},
        {"form": Form.PORTABLE},
        {"dtype": torch.float16},
        {"capacity": 65},
        {"streams": 2},
        {"variant": StepVariant(watch=True)},
        {"variant": StepVariant(opset=25)},
        {"variant": StepVariant(integer_cache=True)},
        {"variant": StepVariant({MATRIX: torch.nn.Linear(4, 4, device="meta")})},
    ]
    for change in changes:
        with pytest.raises(Traced):
            trace_step(**whole | change)


def test_frames_of_any_size_share_a_graph_that_does_not_know_them(place: Path) -> None:
    other = small_model(StreamLayout(3, 5, after=2), layers=1, context_frames=3).config
    assert content(trace_step(other, Form.MODERN, capacity=64)) == content(known())
    with pytest.raises(Traced):
        trace_step(replace(other, slot_embedding=True), Form.MODERN, capacity=64)


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int4-weight"])
def test_matrices_of_other_data_share_a_graph(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path / "cache"))

    def quantised(seed: int) -> bytes:
        stored: Any = {MATRIX: np.random.default_rng(seed).standard_normal((32, 32)).astype(np.float32)}
        weight = Weight(stored, MATRIX, np.dtype(np.float32))
        matrix = quantised_matrix(weight, 1.0 + seed, SCHEMES[precision], Form.PREFIX)
        return content(trace_step(CONFIG, Form.PREFIX, variant=StepVariant({MATRIX: matrix}, opset=24)))

    first = quantised(0)
    monkeypatch.setattr(known_graphs, "trace", tracing)
    assert quantised(1) == first
    with pytest.raises(Traced):
        trace_step(CONFIG, Form.PREFIX)


def test_graphs_of_a_tokenizer_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path / "cache"))

    def written(height: int, name: str) -> list[bytes]:
        graphs, folder = PatchGraphs(height, 12, codes=16, side=4), tmp_path / name
        folder.mkdir()
        source = RandomCheckpoint(graphs.expected_shapes(), seed=0)
        write_tokenizer(graphs, source, folder, Progress())
        return [(folder / file).read_bytes() for file in TOKENIZER_FILES.values()]

    first = written(8, "first")
    monkeypatch.setattr(known_graphs, "trace", tracing)
    assert written(8, "again") == first
    with pytest.raises(Traced):
        written(12, "higher")


def test_a_damaged_graph_is_traced_again(place: Path) -> None:
    (kept,) = (place / KIND).iterdir()
    body = bytearray(kept.read_bytes())
    body[len(body) // 2] ^= 1
    kept.write_bytes(body)
    with pytest.raises(Traced):
        known()
