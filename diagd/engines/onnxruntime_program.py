"""A step graph of ONNX Runtime bound to fixed addresses, on its CUDA provider or on the CPU."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from diagd.engines.host import installed
from diagd.engines.onnxruntime_session import check_inputs
from diagd.engines.tensors import Tensor
from diagd.errors import EngineError, require


class OnnxRuntimeProgram:
    """One binding a width over one session; see ``Program``.

    On CUDA the session queues on the device's stream. Its allocations cannot be captured from outside, so it
    captures a graph of its own for every width, which belongs to the thread of its first run.
    """

    capturable = False

    def __init__(
        self, session: Any, tensors: Mapping[str, Tensor], widths: tuple[int, ...], kind: str
    ) -> None:
        runtime = require("onnxruntime", extra="cuda", purpose="run step graphs")
        self._session = session
        check_inputs(session, {name: len(tensor.shape) for name, tensor in tensors.items()})
        self._bindings = {width: self._bind(tensors, width, kind) for width in widths}
        self._options = {width: runtime.RunOptions() for width in widths}
        for width, options in self._options.items():
            if kind == "cuda":
                options.add_run_config_entry("gpu_graph_id", str(width))
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def enqueue(self, width: int) -> None:
        """Queue one step of ``width`` rows."""
        self._session.run_with_iobinding(self._bindings[width], self._options[width])

    def _bind(self, tensors: Mapping[str, Tensor], width: int, kind: str) -> Any:
        binding = self._session.io_binding()
        for value in self._session.get_inputs():
            tensor = tensors[value.name]
            binding.bind_input(value.name, kind, 0, tensor.dtype, tensor.at_width(width), tensor.address)
        for value in self._session.get_outputs():
            tensor = tensors[value.name]
            binding.bind_output(value.name, kind, 0, tensor.dtype, tensor.at_width(width), tensor.address)
        return binding


CUDA: Final = "CUDAExecutionProvider"

LEAST: Final = (1, 31)
"""ONNX Runtime from which every node of our graphs has a CUDA kernel (1.27) and a replayed graph no longer
reads a pinned buffer that was freed after its capture (1.31)."""

INSTALL: Final = (
    "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]>=1.31' "
    "(its libraries are of CUDA 13: the driver must be 580 or later)"
)

UNWANTED: Final = ["GatherSliceToSplitFusion"]
"""It makes slices one uneven split, whose sizes and addresses the provider copies up: four copies."""

SIZES: Final = frozenset({"Shape", "Size", "Squeeze"})
"""Operators that ONNX Runtime gives to the CPU without a copy or a wait: they read no data, or, as it has a
kernel of Squeeze on CUDA, only what such an operator gives."""


def _load_libraries(runtime: Any) -> str:
    """Load pip's CUDA libraries, which are not on the loader's path; what it says of those it cannot load.

    Raises:
        EngineError: there is no CUDA provider that could use them.
    """
    if problem := provider_problem(runtime.__version__, runtime.get_available_providers()):
        raise EngineError(f"{problem}; run: {INSTALL}")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runtime.preload_dlls()
    return " ".join(said.getvalue().split()) or "no library was missed"


def provider_problem(version: str, providers: list[str]) -> str | None:
    """Why the ONNX Runtime that is imported cannot run steps on a GPU, or None.

    ``onnxruntime`` and ``onnxruntime-gpu`` are two packages over one folder: where both are installed, files
    of the one that came last stand there, whatever pip lists.

    Args:
        version: that the imported module says.
        providers: that it has.
    """
    host, gpu = (installed(package) for package in ("onnxruntime", "onnxruntime-gpu"))
    if gpu is None:
        return None if CUDA in providers else f"ONNX Runtime {version} has no CUDA provider"
    if host is not None and (CUDA not in providers or version != gpu):
        return (
            f"onnxruntime {host} and onnxruntime-gpu {gpu} are both installed, in one folder; what is there "
            f"says {version} {'with' if CUDA in providers else 'without'} a CUDA provider"
        )
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < LEAST:
        least = ".".join(map(str, LEAST))
        return f"ONNX Runtime {version} is too old for step graphs on CUDA, {least} or later is needed"
    return None if CUDA in providers else f"onnxruntime-gpu {gpu} offers no CUDA provider on this machine"


def nodes_outside(session: Any, provider: str = CUDA) -> list[str]:
    """Nodes of a session that another provider runs, as ``operator (name)``.

    Args:
        session: made with ``session.record_ep_graph_assignment_info``.
        provider: the one that should run all but ``SIZES``.

    Raises:
        EngineError: this ONNX Runtime does not say.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise EngineError(f"this ONNX Runtime does not say where its nodes run; run: {INSTALL}")
    return [
        f"{node.op_type} ({node.name})"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.op_type not in SIZES
    ]


def open_cuda_session(
    graph: Path, *, stream: int | None = None, graphs: bool = False, strict: bool = False
) -> Any:
    """A session of the CUDA provider.

    Args:
        graph: the ONNX file.
        stream: handle of the stream it queues on; None: one of its own, which each run waits for.
        graphs: capture and replay CUDA graphs.
        strict: refuse a graph of which nodes are left to the CPU, so that steps would wait for it.

    Raises:
        DependencyError: ONNX Runtime is not installed.
        EngineError: it has no CUDA provider, cannot load it, or refuses the graph.
    """
    runtime = require("onnxruntime", extra="cuda", purpose="run step graphs on the GPU")
    lost = _load_libraries(runtime)
    options = {
        "enable_cuda_graph": str(int(graphs)),
        "use_tf32": "0",  # else products of float32 keep ten bits of each factor
    }
    if stream is not None:
        options["user_compute_stream"] = str(stream)
    settings = runtime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = runtime.InferenceSession(
            str(graph),
            settings,
            providers=[(CUDA, options), "CPUExecutionProvider"],
            disabled_optimizers=UNWANTED,
        )
    except Exception as error:  # ONNX Runtime raises several unrelated types
        raise EngineError(f"ONNX Runtime {runtime.__version__} refuses {graph}: {error}") from error
    if CUDA not in session.get_providers():
        raise EngineError(
            f"ONNX Runtime fell back to the CPU: its CUDA libraries or the driver are missing ({lost}); "
            f"look at nvidia-smi, then run: {INSTALL}"
        )
    if strict and (elsewhere := nodes_outside(session)):
        raise EngineError(
            f"ONNX Runtime leaves {len(elsewhere)} nodes of {graph} to the CPU, steps would wait for it: "
            f"{', '.join(elsewhere[:5])}"
        )
    return session
