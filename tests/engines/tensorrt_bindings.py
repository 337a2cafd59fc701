"""Names of TensorRT that diagd uses, looked up in the Python bindings of the versions it supports.

The bindings are NVIDIA's own wheels; libraries that hold nothing but the entry points let them be imported.
Run from the root to write what they offer beside this file, after using a new name:

    python -m tests.engines.tensorrt_bindings
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import diagd.engines.tensorrt as package

DATA = Path(__file__).with_name("tensorrt_names.json")
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
    "ICudaEngine": (
        "create_execution_context num_io_tensors get_tensor_name get_tensor_mode get_tensor_shape"
    ),
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

CAPABILITIES = {
    "IAttention",
    "IAttention.key_value_lengths",
    "IBuilderConfig.set_compute_capability",
    "ICudaEngine.get_aliased_input_tensor",
    "IKVCacheUpdateLayer",
}
"""What tells one version from another."""

PROBE = """
import json, sys
import tensorrt_bindings as trt
def has(path):
    value = trt
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True
print(json.dumps([path for path in json.load(sys.stdin) if has(path)]))
"""


class NoWheelError(Exception):
    """pip cannot download the bindings."""


def names_used() -> set[str]:
    """Dotted names that the package takes from a TensorRT module."""
    found = set()
    for file in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            parts, value = list[str](), node
            while isinstance(value, ast.Attribute):
                parts.insert(0, value.attr)
                value = value.value
            root = value.id if isinstance(value, ast.Name) else ""
            if root == "self" and parts and parts[0] in {"trt", "_trt"}:
                root, parts = "trt", parts[1:]
            if root == "trt" and parts and not parts[0].startswith("__"):
                found.add(".".join(parts[:2] if parts[0][0].isupper() else parts[:1]))
    return found


def names_needed() -> set[str]:
    """Everything to look up, whatever the version."""
    methods = {**METHODS, **MODERN_METHODS}
    listed = {f"{kind}.{name}" for kind, names in methods.items() for name in names.split()}
    return listed | CAPABILITIES | {name for name in names_used() if not name.startswith("ComputeCapability")}


def names_offered(version: str, folder: Path) -> list[str]:
    """The names needed that a version's bindings have, sorted.

    Raises:
        NoWheelError: the wheel cannot be downloaded.
    """
    unpack(version, folder)
    root = Path(package.__file__).parents[3]
    outcome = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps(sorted(names_needed())),
        env={"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}:{root}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if outcome.returncode:
        raise RuntimeError(f"{version} cannot be imported: {outcome.stderr}")
    found: list[str] = json.loads(outcome.stdout)
    return found


def unpack(version: str, folder: Path) -> None:
    """A version's bindings beside the libraries they ask for."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    outcome = subprocess.run(
        [*command, "-d", str(folder), version], capture_output=True, text=True, timeout=60, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        raise NoWheelError(f"{version} cannot be downloaded: {outcome.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    major = version.partition("==")[2].split(".")[0]
    for library, symbols in ENTRY_POINTS.items():
        source = folder / f"{library}.cpp"
        source.write_text("".join(f'extern "C" void* {name}() {{ return 0; }}\n' for name in symbols.split()))
        name = f"lib{library}.so.{major}"
        link = ["g++", "-shared", "-fPIC", str(source), "-o", str(folder / name), f"-Wl,-soname,{name}"]
        subprocess.run(link, check=True, capture_output=True)


def main() -> None:
    found = {}
    for version in VERSIONS:
        with tempfile.TemporaryDirectory() as folder:
            found[version] = names_offered(version, Path(folder))
    DATA.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{DATA}: {', '.join(f'{len(names)} of {version}' for version, names in found.items())}")


if __name__ == "__main__":
    main()
