"""ONNX Runtime sessions with the settings that were measured to matter, and their prepacked weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from diagd.bundle import cache
from diagd.engines.buffers import ALIGNMENT
from diagd.engines.host import cores, processor_features
from diagd.errors import BundleError, EngineError, UsageError, require
from diagd.options import OPTIONS

if TYPE_CHECKING:
    import onnxruntime

SPIN_MICROSECONDS = 50
"""Idle worker threads spin this long: enough to bridge the gaps inside a step, harmless on a busy machine."""

MOST_THREADS = 1024
"""More than any machine has cores: they would only take memory and time to start."""

UNWANTED = ["MatMulAddFusion"]
"""It makes a product and its residual one Gemm, which hides the product from the fusion with Q/DQ."""


PACKED = "step.onnx"
"""Name of a packed graph; an entry of the cache without it says that the weights cannot be packed."""


@dataclass(frozen=True, config=OPTIONS)
class CpuOptions:
    """What runs on the processor, and how.

    Without ``fuse``, quantised products are computed in floating point: there is no other way for FP8.
    """

    threads: int = Field(default=0, description="CPU threads, 0 for one a core")
    prepack: bool = Field(default=True, description="cache packed weights on this machine")
    fuse: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= MOST_THREADS:
            raise UsageError(f"{self.threads} threads; expected 1 to {MOST_THREADS}, or 0 for one a core")

    def suiting(self, precision: str) -> CpuOptions:
        """These options for a step graph of a precision: products of FP8 cannot be fused."""
        return replace(self, fuse=False) if precision.startswith("fp8") else self


def open_session(graph: Path, digest: str, options: CpuOptions) -> onnxruntime.InferenceSession:
    """Load a step graph on the CPU.

    The first load on a machine writes the weights as this ONNX Runtime packs them for this processor; later
    loads map that file, which is faster and shares its pages between processes.

    Args:
        graph: the ONNX file.
        digest: of the graph and its weights, under which they are cached.
        options: threads and cache use.

    Raises:
        EngineError: ONNX Runtime refuses the graph.
    """
    runtime = require("onnxruntime", extra="export", purpose="run step graphs on the CPU")
    if options.prepack:
        graph = _prepacked(runtime, graph, digest, options)
    return _load(runtime, graph, _settings(runtime, options))


def open_plainly(graph: Path) -> onnxruntime.InferenceSession:
    """Load a graph with all off that could go wrong: one thread, no optimisation, no packed weights."""
    runtime = require("onnxruntime", extra="export", purpose="run step graphs on the CPU")
    settings = runtime.SessionOptions()
    settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    return runtime.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])


def check_inputs(session: Any, axes: Mapping[str, int]) -> None:
    """Refuse a graph that takes other inputs than an engine of its form gives it.

    Args:
        session: over the graph.
        axes: of what the engine gives, by name; it may have more than the graph takes.

    Raises:
        BundleError: the graph takes an input that is not among them, or one with other axes.
    """
    for value in session.get_inputs():
        if axes.get(value.name) != len(value.shape):
            has = f"{axes[value.name]} axes" if value.name in axes else "no such input"
            raise BundleError(
                f"the step graph takes '{value.name}' with {len(value.shape)} axes, its form has {has}: the "
                "bundle is of another version of diagd, or its manifest was changed; export it again"
            )


def _load(
    runtime: onnxruntime, graph: Path, settings: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    try:
        return runtime.InferenceSession(
            str(graph), settings, providers=["CPUExecutionProvider"], disabled_optimizers=UNWANTED
        )
    except Exception as error:  # ONNX Runtime raises several unrelated types
        raise EngineError(f"ONNX Runtime {runtime.__version__} refuses {graph}: {error}") from error


def _settings(runtime: onnxruntime, options: CpuOptions) -> onnxruntime.SessionOptions:
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = options.threads or cores()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    if not options.fuse:
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    settings.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    return settings


def _prepacked(runtime: onnxruntime, graph: Path, digest: str, options: CpuOptions) -> Path:
    """The graph with its weights as this machine packs them, from the cache; without one, itself."""

    def pack(folder: Path) -> None:
        settings, packed = _settings(runtime, options), folder / PACKED
        settings.optimized_model_filepath = str(packed)
        settings.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        settings.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{packed.stem}.bin"
        )
        _load(runtime, graph, settings)
        if not _is_aligned(packed):
            for file in list(folder.iterdir()):
                file.unlink()

    parts = [digest, runtime.__version__, processor_features(), str(options.fuse), *UNWANTED]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    size = sum(file.stat().st_size for file in graph.parent.glob("*.bin"))  # at most, for others use them too
    found = cache.entry("prepacked", key, pack, size)
    return found / PACKED if found and (found / PACKED).is_file() else graph


def _is_aligned(packed: Path) -> bool:
    """Whether every packed weight starts on a cache line of its file.

    ONNX Runtime reads them with aligned loads but places them without padding, so that one tensor of an odd
    size shifts all that follow, and the process crashes.
    """
    starts = re.findall(rb"\+\d+\|(\d+);\d+;", packed.read_bytes())
    return all(int(start) % ALIGNMENT == 0 for start in starts)
