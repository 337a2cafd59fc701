"""``diagd inspect``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx
import pytest

from diagd.bundle import read_manifest
from diagd.cli.main import main
from diagd.runtime.video import read_frames
from tests.cli.conftest import Workplace


def test_a_bundle(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(workplace.bundle)]) == 0
    shown = capsys.readouterr().out
    for part in ("grid", "tokenizer", "MatMul", "schedule k=", "step.onnx"):
        assert part in shown, part


def test_the_table_and_the_picture(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--k", "2", "--d", "chained", "--steps", "4"]
    assert main(["inspect", str(workplace.bundle), *options]) == 0
    shown = capsys.readouterr().out
    assert "step 3:" in shown
    assert "step 4:" not in shown
    picture = tmp_path / "frontier.gif"
    assert main(["inspect", str(workplace.bundle), "--k", "1", "--draw", str(picture)]) == 0
    layout = read_manifest(workplace.bundle).layout
    assert len(read_frames(picture)) >= layout.columns


def test_json_counts_what_onnx_counts(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    graph = workplace.bundle / "step.onnx"
    assert main(["inspect", str(graph), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["graphs"]["step.onnx"]
    model = onnx.load(graph, load_external_data=False).graph
    assert content["operators"] == dict(Counter(node.op_type for node in model.node))
    assert list(content["inputs"]) == [value.name for value in model.input]
    assert main(["inspect", str(workplace.bundle), "--json", "--k", "1", "--frames", "2"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["graphs"]["step.onnx"] == content
    assert whole["manifest"]["family"] == "world"
    assert len(whole["schedule"]["step_of_cell"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.diagd"], "no bundle"),
        (["{bundle}/manifest.json"], "ONNX"),
        (["{bundle}", "--draw", "x.jpg"], ".gif or .png"),
        (["{bundle}/step.onnx", "--draw", "x.gif"], "has no schedule"),
        (["{bundle}", "--frames", "0"], "at least one frame"),
    ],
)
def test_mistakes_are_told(
    workplace: Workplace, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *(word.format(bundle=workplace.bundle) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
