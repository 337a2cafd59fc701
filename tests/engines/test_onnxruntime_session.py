"""What keeps ONNX Runtime's CUDA provider from running is told before a step does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from diagd.engines.onnxruntime_session import (
    CUDA,
    INSTALL,
    check_integer_rows,
    open_cuda_session,
    open_plainly,
    provider_problem,
)
from diagd.errors import EngineError


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Packages as pip records them, ahead of those that are there."""

    def record(package: str, version: str) -> None:
        folder = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    return record


def test_the_processor_package_alone() -> None:
    assert "1.32.0 has no CUDA provider" in str(provider_problem("1.32.0", ["CPUExecutionProvider"]))
    assert provider_problem("1.32.0", [CUDA]) is None  # built by hand


@pytest.mark.parametrize("providers", [["CPUExecutionProvider"], [CUDA]])
def test_two_packages_in_one_folder(install: Callable[[str, str], None], providers: list[str]) -> None:
    install("onnxruntime-gpu", "1.31.1")
    install("onnxruntime", "1.32.0")
    problem = provider_problem("1.32.0", providers)
    assert problem is not None
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed, in one folder" in problem


def test_both_recorded_and_the_gpu_one_on_top(install: Callable[[str, str], None]) -> None:
    install("onnxruntime-gpu", "1.31.1")
    assert provider_problem("1.31.1", [CUDA, "CPUExecutionProvider"]) is None


@pytest.mark.parametrize("version", ["1.24.4", "1.30.0", "1.9.1"])
def test_versions_that_cannot_run_the_graphs(install: Callable[[str, str], None], version: str) -> None:
    install("onnxruntime-gpu", version)
    assert provider_problem(version, [CUDA]) == (
        f"ONNX Runtime {version} is too old for step graphs on CUDA, 1.31 or later is needed"
    )


def test_the_error_names_the_line_that_mends_it(tmp_path: Path) -> None:
    import onnxruntime

    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(EngineError, match="no CUDA provider") as caught:
        open_cuda_session(tmp_path / "step.onnx")
    assert INSTALL in str(caught.value)


@pytest.mark.parametrize("version", ["1.23.2", "1.26.0"])
def test_versions_that_change_rows_of_integers_are_refused(version: str) -> None:
    with pytest.raises(EngineError, match=rf"ONNX Runtime {version} .* pip install --upgrade onnxruntime"):
        check_integer_rows(version)
    for good in ("1.27.0", "1.31.1", "2.0.0"):
        check_integer_rows(good)


def test_graphs_of_later_versions_are_told_as_such(tmp_path: Path) -> None:
    """An opset that this ONNX Runtime does not know yet."""
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "later", [], [])
    for inputs, name in ((graph.input, "x"), (graph.output, "y")):
        inputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 99)], ir_version=10)
    (tmp_path / "later.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=r"does not have all that .*later\.onnx needs, later ones do"):
        open_plainly(tmp_path / "later.onnx")
