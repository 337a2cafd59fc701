"""Imports point one way, and a device needs neither PyTorch nor the exporter."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diagd"
ENGINES = {"bundle", "schedule"}
RUNTIME = {"engines"} | ENGINES
EXPORT = {"runtime"} | RUNTIME
ABOVE = {"export"} | EXPORT
BELOW = {
    "schedule": set(),
    "bundle": {"schedule"},
    "engines": ENGINES,
    "runtime": RUNTIME,
    "export": EXPORT,
    "calibration": ABOVE,
    "tuning": {"cluster"} | ABOVE,
    "profiling": EXPORT,
    "play": {"runtime"} | RUNTIME,
    "web": {"play", "runtime"} | RUNTIME,
    "serve": {"play", "runtime"} | RUNTIME,
    "cluster": {"play", "runtime"} | RUNTIME,
    "cli": {"calibration", "tuning", "profiling", "play", "web", "serve", "cluster"} | ABOVE,
}
"""Packages that each package may import, besides itself and the modules at the top."""

TORCH = {"export", "calibration", "tuning"}
"""Packages that may import PyTorch."""

HEAVY = {"torch", "onnx", "onnxscript", "onnx_ir", "transformers", "tensorrt", "tensorrt_rtx", "safetensors"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_map_names_every_package() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == BELOW.keys()


@pytest.mark.parametrize("layer", BELOW)
def test_imports_point_down(layer: str) -> None:
    for file in (PACKAGE / layer).rglob("*.py"):
        for name in imports(file):
            parts = name.split(".")
            assert parts[0] not in {"worlds", "benchmarks", "tests"}, f"{file} imports {name}"
            assert parts[0] != "torch" or layer in TORCH, f"{file} imports {name}"
            if parts[0] == "diagd" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
                assert parts[1] in BELOW[layer] | {layer}, f"{file} imports {name}"


def test_worlds_use_the_package_alone() -> None:
    for file in (ROOT / "worlds").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(file)} & {"benchmarks", "tests"}, file


@pytest.mark.parametrize("layer", ["schedule", "bundle", "runtime"])
def test_the_runtime_imports_nothing_heavy(layer: str) -> None:
    for file in (PACKAGE / layer).rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(file)} & HEAVY, file


def test_generation_runs_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "safetensors", "onnx_ir"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import diagd
diagd.load
from diagd.cli.main import main
print(main(["generate", "none.diagd", "--prompt", "a.png", "--output", "a.mp4"]))
print(main(["export", "--model", "mineworld-300m"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "2"]
    assert "no bundle at none.diagd" in done.stderr
    assert "pip install 'diagd[export]'" in done.stderr


def test_functions_stay_short() -> None:
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "worlds").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 60, f"{file}: {node.name} has {length} lines"


def test_the_map_names_every_module_and_nothing_else() -> None:
    """docs/architecture.md, which a reader starts with."""
    rows = re.findall(r"^\| `(\w+)/` \| (.*) \|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    packages = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()}
    assert packages <= {name for name, _ in rows}
    for name, text in rows:
        folder = PACKAGE / name if (PACKAGE / name).is_dir() else ROOT / name
        modules = {file.stem for file in folder.glob("*.py")} - {"__init__"}
        folders = {file.name for file in folder.iterdir() if file.is_dir() and "." not in file.name}
        modules |= folders - {"__pycache__"}
        named = set(re.findall(r"`(\w+)/?`", text))
        if name != "cli":  # whose modules are the verbs
            assert modules <= named, f"{name}: {sorted(modules - named)}"
        known = {file.stem for file in folder.rglob("*")} | packages | {"diagd", "Steps"}
        assert named <= known, f"{name}: {sorted(named - known)}"
