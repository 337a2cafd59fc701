"""``models``, ``plan`` and ``inspect`` on a machine that has no PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from diagd.export.families import MODULES
from tests.cli.conftest import Workplace

BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(ABSENT))  # importing any of them raises
from diagd.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


EXTRAS = (
    "torch", "onnx", "onnx_ir", "ml_dtypes", "onnxscript", "safetensors", "huggingface_hub", "openvino",
    "websockets", "gymnasium", "ray", "transformers", "jinja2", "matplotlib", "scipy", "skimage",
)  # fmt: skip


def run(*arguments: str, absent: tuple[str, ...] = ("torch",)) -> str:
    command = [sys.executable, "-c", BLOCKED.replace("ABSENT", repr(absent)), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1), result.stderr
    return result.stdout


def test_models_are_listed() -> None:
    for absent in (("torch",), EXTRAS):
        names = {row["model"] for row in json.loads(run("models", "--json", absent=absent))}
        assert names == MODULES.keys() - {"world"}


@pytest.mark.parametrize("name", ["crafter-3m", "cosmos-5b-video2world", "mineworld-300m", "wham-200m"])
def test_models_are_planned(name: str) -> None:
    plan = json.loads(run("plan", name, "--device", "orin-agx", "--json"))
    assert plan["model"]["streamed"] > 0
    assert plan["model"]["tokenizer"] > 0


def test_verbs_explain_themselves_without_extras() -> None:
    head, _, _ = BLOCKED.replace("ABSENT", repr(EXTRAS)).partition("from diagd")
    each = "[importlib.import_module('diagd.cli.' + verb).VERB for verb in VERBS]"
    script = f"{head}\nimport importlib\nfrom diagd.cli.verbs import VERBS\n{each}"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_bundle_is_planned_and_inspected(workplace: Workplace) -> None:
    for absent in (("torch",), EXTRAS):
        planned = run("plan", str(workplace.bundle), "--device", "orin-agx", "--json", absent=absent)
        assert json.loads(planned)["stored"]
    shown = run("inspect", str(workplace.bundle))
    assert "schedule k=" in shown
    assert "MatMul" in shown


def test_a_bundle_is_inspected_without_the_onnx_package(workplace: Workplace) -> None:
    shown = run("inspect", str(workplace.bundle), absent=("torch", "onnx"))
    assert "schedule k=" in shown
    assert "streamed by a step" in shown
    assert "diagd[export]" in shown
    content = json.loads(run("inspect", str(workplace.bundle), "--json", absent=("torch", "onnx")))
    assert content["graphs"] == {}
    assert content["manifest"]["graphs"][0]["weights"]["streamed"] > 0


@pytest.mark.parametrize(
    "verb",
    [
        ["calibrate", "BUNDLE", "--precision", "int8"],
        ["plan", "wham-200m", "--device", "orin-agx", "--checkpoint", "f.pt"],
    ],
    ids=["calibrate", "plan"],
)
def test_what_needs_it_says_so(workplace: Workplace, verb: list[str]) -> None:
    given = [str(workplace.bundle) if word == "BUNDLE" else word for word in verb]
    command = [sys.executable, "-c", BLOCKED.replace("ABSENT", repr(("torch", "ml_dtypes"))), *given]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install" in result.stderr
    assert "export" in result.stderr
