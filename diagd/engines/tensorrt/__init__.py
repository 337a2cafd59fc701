"""TensorRT 10, 11 and TensorRT-RTX: what is installed can be told apart by what it offers, not by version."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from types import ModuleType

from diagd.bundle import Form
from diagd.errors import DependencyError, EngineError, pip_line, require

RUNTIMES = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
"""Modules with one and the same API, the preferred one first, and the extra of diagd that brings each."""


@dataclass(frozen=True)
class Capabilities:
    """What one installed TensorRT can do.

    Attributes:
        runtime: module name.
        version: of the module.
        in_place_cache: has the KV cache update layer (10.15).
        live_lengths: attention can be told how many slots are in use (11.0).
        reports_aliases: an engine says which output shares memory with which input (10.15).
        cross_targets: GPUs that engines can be built for without having one, as ``sm89``; empty where an
            engine is built on the GPU it runs on.
        timing_cache: measured kernels may be kept for the next build.
    """

    runtime: str
    version: str
    in_place_cache: bool
    live_lengths: bool
    reports_aliases: bool
    cross_targets: tuple[str, ...]
    timing_cache: bool

    @property
    def form(self) -> Form:
        """The form of step graph that suits it best."""
        return Form.MODERN if self.in_place_cache else Form.PORTABLE

    @property
    def name(self) -> str:
        """Runtime and version; engines of one are not read by another."""
        return f"{self.runtime} {self.version}"


def import_tensorrt(runtime: str | None = None) -> ModuleType:
    """The installed TensorRT module, of no name the first that is; DependencyError where none is."""
    if runtime is None:
        runtime = next((name for name in RUNTIMES if importlib.util.find_spec(name)), None)
    if runtime is None:
        raise DependencyError(
            f"no TensorRT is installed; for an NVIDIA desktop GPU run: {pip_line('tensorrt')}, or "
            f"{pip_line('rtx')}; on a Jetson use the one JetPack brings (docs/jetson.md)"
        )
    return require(runtime, extra=RUNTIMES[runtime], purpose="compile step graphs for a GPU")


def capabilities(trt: ModuleType) -> Capabilities:
    """Ask a TensorRT module what it offers."""
    attention = getattr(trt, "IAttention", None)
    cross = hasattr(trt.IBuilderConfig, "set_compute_capability")
    return Capabilities(
        runtime=trt.__name__,
        version=str(getattr(trt, "__version__", "unknown")),
        in_place_cache=hasattr(trt, "IKVCacheUpdateLayer"),
        live_lengths=hasattr(attention, "key_value_lengths"),
        reports_aliases=hasattr(trt.ICudaEngine, "get_aliased_input_tensor"),
        cross_targets=_targets(trt.ComputeCapability) if cross else (),
        timing_cache=not cross,  # it would need the GPU that a cross build does without
    )


def check_targets(offered: Capabilities, targets: tuple[str, ...]) -> None:
    """Refuse (EngineError) to build for GPUs that this TensorRT cannot build for from here."""
    wrong = [target for target in targets if target not in offered.cross_targets]
    if not wrong:
        return
    if not offered.cross_targets:
        raise EngineError(
            f"{offered.name} builds only for the GPU of the machine it runs on; run diagd-build without "
            f"--targets there, or install TensorRT-RTX: {pip_line('rtx')}"
        )
    raise EngineError(
        f"{offered.name} has no target {', '.join(wrong)}; it builds for {', '.join(offered.cross_targets)}; "
        "for other GPUs use TensorRT on the machine itself"
    )


def _targets(enum: type) -> tuple[str, ...]:
    names = [name.lower() for name in enum.__members__ if name.startswith("SM")]  # type: ignore[attr-defined]
    return tuple(sorted(names, key=lambda name: int(name[2:])))
