"""Every name of TensorRT that diagd uses, looked up in the bindings of the versions it supports.

The bindings are NVIDIA's own wheels; libraries that hold nothing but the entry points let them be imported.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import diagd.engines.tensorrt as package

VERSIONS = {
    "tensorrt-cu12-bindings==10.3.0": {"portable", "timing"},
    "tensorrt-cu13-bindings==10.16.1.11": {"modern", "timing", "aliases"},
    "tensorrt-cu13-bindings==11.4.0.106": {"modern", "timing", "aliases", "lengths"},
}
ENTRY_POINTS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
        "getPluginRegistry getBuilderPluginRegistry getInferLibVersion"
    ),
    "nvonnxparser": (
        "createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getNvOnnxParserVersion"
    ),
    "nvinfer_plugin": "initLibNvInferPlugins",
}
METHODS = {
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network",
    "INetworkDefinition": "num_layers get_layer num_inputs get_input add_input",
    "OnnxParser": "parse_from_file num_errors get_error",
    "IBuilderConfig": (
        "add_optimization_profile builder_optimization_level progress_monitor create_timing_cache "
        "get_timing_cache set_timing_cache"
    ),
    "IOptimizationProfile": "set_shape",
    "IProgressMonitor": "phase_start step_complete phase_finish",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "create_execution_context num_io_tensors get_tensor_name get_tensor_mode",
    "IExecutionContext": (
        "set_optimization_profile_async set_input_shape set_tensor_address execute_async_v3"
    ),
    "ITimingCache": "serialize",
    "ITensor": "name shape dtype",
    "ILayer": "type get_input",
}
MODERN_METHODS = {"IAttention": "decomposable", "IAttentionInputLayer": "attention"}
GUARDED = {
    "IAttention",
    "IAttentionInputLayer",
    "LayerType.ATTENTION_INPUT",
    "ComputeCapability",
    "IKVCacheUpdateLayer",
}
"""Looked up only where capabilities say that they exist."""

PROBE = """
import json, sys
import tensorrt_bindings as trt
from diagd.engines.tensorrt.capabilities import capabilities
def has(path):
    value = trt
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True
offered = capabilities(trt)
missing = [path for path in json.load(sys.stdin) if not has(path)]
print(json.dumps({"missing": missing, "form": offered.form.value, "aliases": offered.reports_aliases,
    "lengths": offered.live_lengths, "timing": offered.timing_cache, "targets": offered.cross_targets}))
"""


def names_used() -> set[str]:
    """Dotted names that the package takes from a TensorRT module."""
    found = set()
    for file in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            parts, value = [], node
            while isinstance(value, ast.Attribute):
                parts.insert(0, value.attr)
                value = value.value
            root = value.id if isinstance(value, ast.Name) else ""
            if root == "self" and parts and parts[0] in {"trt", "_trt"}:
                root, parts = "trt", parts[1:]
            if root == "trt" and parts and not parts[0].startswith("__"):
                found.add(".".join(parts[:2] if parts[0][0].isupper() else parts[:1]))
    return found


@pytest.fixture(scope="module", params=VERSIONS, ids=str)
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A version's bindings, unpacked beside the libraries they ask for."""
    if shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("g++ is needed for the libraries that stand in for TensorRT's")
    folder = tmp_path_factory.mktemp("bindings")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    outcome = subprocess.run(
        [*command, "-d", str(folder), request.param], capture_output=True, text=True, timeout=60, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"{request.param} cannot be downloaded: {outcome.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    major = request.param.partition("==")[2].split(".")[0]
    for library, symbols in ENTRY_POINTS.items():
        source = folder / f"{library}.cpp"
        source.write_text("".join(f'extern "C" void* {name}() {{ return 0; }}\n' for name in symbols.split()))
        name = f"lib{library}.so.{major}"
        link = ["g++", "-shared", "-fPIC", str(source), "-o", str(folder / name), f"-Wl,-soname,{name}"]
        subprocess.run(link, check=True, capture_output=True)
    return request.param, folder


def test_every_name_exists_in_every_version(bindings: tuple[str, Path]) -> None:
    version, folder = bindings
    expected = VERSIONS[version]
    methods = METHODS | (MODERN_METHODS if "modern" in expected else {})
    wanted = {f"{kind}.{name}" for kind, names in methods.items() for name in names.split()}
    used = {
        name
        for name in names_used()
        if not name.startswith("ComputeCapability")
        and ("modern" in expected or not any(name.startswith(guarded) for guarded in GUARDED))
    }
    assert {"Builder", "OnnxParser", "Runtime", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"} <= used
    root = Path(package.__file__).parents[3]
    outcome = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps(sorted(wanted | used)),
        env={"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}:{root}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    answer = json.loads(outcome.stdout)
    assert answer["missing"] == []
    assert answer["form"] == ("modern" if "modern" in expected else "portable")
    assert answer["targets"] == []
    for capability in ("aliases", "lengths", "timing"):
        assert answer[capability] == (capability in expected), capability
