"""``diagd inspect``."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import onnx
import pytest
from onnx.inliner import inline_local_functions

from diagd.cli.main import main
from tests.cli.conftest import Workplace


def test_a_bundle(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(workplace.bundle)]) == 0
    shown = capsys.readouterr().out
    for part in ("grid", "tokenizer", "MatMul", "schedule k=", "step.onnx"):
        assert part in shown, part


def test_the_table(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--order", "k=2 chained", "--steps", "4"]
    assert main(["inspect", str(workplace.bundle), *options]) == 0
    shown = capsys.readouterr().out
    assert "step 3:" in shown
    assert "step 4:" not in shown


def test_json_counts_what_onnx_counts(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    graph = workplace.bundle / "step.onnx"
    assert main(["inspect", str(graph), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["graphs"]["step.onnx"]
    model = inline_local_functions(onnx.load(graph, load_external_data=False)).graph
    assert content["operators"] == dict(Counter(node.op_type for node in model.node))
    assert list(content["inputs"]) == [value.name for value in model.input]
    assert main(["inspect", str(workplace.bundle), "--json", "--order", "k=1", "--frames", "2"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["graphs"]["step.onnx"] == content
    assert whole["manifest"]["family"] == "world"
    assert len(whole["schedule"]["step_of_cell"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.diagd"], "no bundle"),
        (["{bundle}/manifest.json"], "ONNX"),
        (["{bundle}/step.onnx", "--steps", "2"], "has no schedule"),
        (["{bundle}/step.onnx", "--order", "k=1"], "has no schedule"),
        (["{bundle}", "--frames", "0"], "--frames 0: Input should be greater than or equal to 1"),
        (["{bundle}", "--steps", "-1"], "--steps -1: Input should be greater than or equal to 0"),
    ],
)
def test_mistakes_are_told(
    workplace: Workplace, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *(word.format(bundle=workplace.bundle) for word in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_shapes_are_shown(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of axes in brackets are not taken for styles."""
    assert main(["inspect", str(workplace.bundle / "step.onnx")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    model = onnx.load(workplace.bundle / "step.onnx", load_external_data=False).graph
    sources = next(value for value in model.input if value.name == "sources")
    streams, rows = (axis.dim_param for axis in sources.type.tensor_type.shape.dim)
    assert f"sources int32[{streams}, {rows}]" in shown


def test_a_truncated_graph_is_told(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes((workplace.bundle / "step.onnx").read_bytes()[:5000])
    assert main(["inspect", str(cut)]) == 2
    assert "cut.onnx cannot be read as ONNX" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["weights.bin", "tokenizer.bin"])
def test_files_of_weights_are_looked_for(
    workplace: Workplace, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(workplace.bundle, tmp_path / "a.diagd")
    (bundle / name).unlink()
    assert main(["inspect", str(bundle)]) == 2
    assert f"file '{name}' is missing" in capsys.readouterr().err


def test_steps_are_in_the_json_too(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--order", "k=1", "--steps", "3")
    assert main(["inspect", str(workplace.bundle), *options, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["schedule"]["table"]
    assert main(["inspect", str(workplace.bundle), *options]) == 0
    printed = capsys.readouterr().out
    assert len(lines) == 3
    assert all(line in printed for line in lines)
