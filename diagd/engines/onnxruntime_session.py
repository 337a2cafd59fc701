"""ONNX Runtime sessions with the settings that were measured to matter, and their prepacked weights.

On the CUDA provider, and in forms of fixed width, they are bound to the fixed addresses of a step's tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from diagd.bundle import Bundle, cache
from diagd.bundle.files import sha256
from diagd.bundle.manifest import StepGraph
from diagd.engines.devices.kernels import host_build, register_host
from diagd.engines.host import cores, installed, processor_features, sums_eight_bits
from diagd.engines.tensors import ALIGNMENT, Tensor, check_shapes
from diagd.errors import BundleError, DiagdError, EngineError, UsageError, require
from diagd.options import checked, setting

if TYPE_CHECKING:
    import onnxruntime


SPIN_MICROSECONDS = 50
"""Idle worker threads spin this long: enough to bridge the gaps inside a step, harmless on a busy machine."""

MOST_THREADS = 1024
"""More than any machine has cores: they would only take memory and time to start."""

UNWANTED: Final = {"cpu": ["MatMulAddFusion"], "cuda": ["GatherSliceToSplitFusion"]}
"""The first makes a product and its residual one Gemm, which hides the product from the fusion with Q/DQ; the
second makes slices one uneven split, whose sizes and addresses the provider copies up: four copies."""


EXACT: Final = "session.x64quantprecision"
"""Has products of eight bits summed in 32; x86 without VNNI sums them in sixteen, which overflow (a fifth off
where all numbers are large). It fails on weights by column without zero points, those of graphs for GPUs."""

INT8_PRODUCT: Final = b"Int8Product"
"""How names of functions begin that graphs of processors have for products of eight bits."""

_open: Final[weakref.WeakSet[Any]] = weakref.WeakSet()
_inherited: Final[list[Any]] = []
"""Sessions that a forked process has of its parent: to free one it would wait for threads that it has not."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _inherited.extend(_open))


PACKED = "step.onnx"
"""Name of a packed graph; an entry of the cache without it says that the weights cannot be packed."""

CUDA: Final = "CUDAExecutionProvider"

UNFUSED: Final = 16
"""The provider's attention by two products and a softmax: they spread over a GPU, its fused one does not."""

LEAST: Final = (1, 31)
"""ONNX Runtime from which every node of our graphs has a CUDA kernel (1.27) and a replayed graph no longer
reads a pinned buffer that was freed after its capture (1.31)."""

LEAST_INTEGER_ROWS: Final = (1, 27)
"""ONNX Runtime from which K/V rows of 8 bits stay what they are where it moves their nodes (1.23 to 1.26 read
them as without a sign, untold)."""

LATER: Final = ("NOT_IMPLEMENTED", "is under development")
"""How it says that an operator or an opset is of a later one."""

NEWER: Final = "later ones do, for Python 3.11 or later: pip install --upgrade onnxruntime"

INSTALL: Final = (
    "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]>=1.31' "
    "(its libraries are of CUDA 13: the driver must be 580 or later)"
)

SIZES: Final = frozenset({"Shape", "Size", "Squeeze"})
"""Operators that ONNX Runtime gives to the CPU without a copy or a wait: they read no data, or, as it has a
kernel of Squeeze on CUDA, only what such an operator gives."""


@checked
class CpuOptions:
    """What runs on the processor, and how.

    Without ``fuse``, quantised products are computed in floating point: there is no other way for FP8.
    """

    threads: int = setting("CPU threads, 0 for one a core", 0)
    prepack: bool = setting("cache packed weights on this machine", True)
    fuse: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= MOST_THREADS:
            raise UsageError(f"{self.threads} threads; expected 1 to {MOST_THREADS}, or 0 for one a core")


def open_step_session(bundle: Bundle, graph: StepGraph, options: CpuOptions) -> onnxruntime.InferenceSession:
    """Load a step graph on the CPU; products of FP8 cannot be fused."""
    if bundle.manifest.cache_dtype(graph) == np.int8:
        check_integer_rows(require("onnxruntime", extra="export", purpose="run step graphs").__version__)
    digest = bundle.graph_digest(graph) if options.prepack else ""
    fuse = options.fuse and not graph.precision.startswith("fp8")
    return open_cpu_session(bundle.file(graph.file), digest, replace(options, fuse=fuse))


def open_cpu_session(graph: Path, digest: str, options: CpuOptions) -> onnxruntime.InferenceSession:
    """Load a graph on the CPU.

    The first load on a machine writes the weights as this ONNX Runtime packs them for this processor; later
    loads map that file, which is faster and shares its pages between processes. Kernels of ours pack theirs
    anew each time. ``digest`` is that of the graph and its weights, under which they are cached.

    Raises:
        EngineError: ONNX Runtime refuses the graph.
    """
    runtime = require("onnxruntime", extra="export", purpose="run step graphs on the CPU")
    settings = _settings(runtime, graph, options)
    if options.prepack and not _packs_itself(graph):
        graph = _prepacked(runtime, graph, digest, options)
    return _load(runtime, graph, settings)


def open_plainly(graph: Path) -> onnxruntime.InferenceSession:
    """Load a graph with all off that could go wrong: one thread, no optimisation, no packed weights."""
    runtime = require("onnxruntime", extra="export", purpose="run step graphs on the CPU")
    settings = runtime.SessionOptions()
    settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    return load_session(runtime, graph, settings, providers=["CPUExecutionProvider"])


def check_values(session: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """``check_shapes`` of a session; ``shapes``: of what the engine binds."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    there = {value.name: value.shape for value in (*inputs, *outputs)}
    check_shapes(there, [value.name for value in inputs], shapes)


def run_bound(session: Any, binding: Any, options: Any = None) -> None:
    """Run what is bound; BundleError where ONNX Runtime refuses, as ids and positions beyond a table."""
    try:
        session.run_with_iobinding(binding, options)
    except RuntimeError as error:
        raise BundleError(
            f"ONNX Runtime cannot run a step: {error}; if memory is short, use a shorter window or fewer "
            "sessions; if ids or positions are beyond a table, a manifest was changed: export it again"
        ) from error


def load_session(
    runtime: onnxruntime, graph: Path, settings: onnxruntime.SessionOptions, **arguments: Any
) -> onnxruntime.InferenceSession:
    """A session over a graph; `refused` where ONNX Runtime refuses it."""
    try:
        session = runtime.InferenceSession(str(graph), settings, **arguments)
    except Exception as error:  # ONNX Runtime raises several unrelated types
        raise refused(f"ONNX Runtime {runtime.__version__}", graph, error) from error
    _open.add(session)
    return session


def refused(library: str, graph: Path, error: Exception) -> DiagdError:
    """That a library refuses a graph; BundleError where it may be for links, which it does not follow far."""
    if any(file.is_symlink() for file in graph.parent.iterdir()):
        return BundleError(
            f"{library} refuses {graph}, where files of {graph.parent} are links, which lead out of it: copy "
            f"the bundle with what they lead to (cp -rL), or link it as a whole ({error})"
        )
    text = str(error)
    if any(told in text for told in LATER):
        return EngineError(f"{library} does not have all that {graph} needs, {NEWER} ({text})")
    return EngineError(f"{library} refuses {graph}: {text}")


def check_integer_rows(version: str) -> None:
    """Refuse (EngineError) an ONNX Runtime of a version that gives other tokens where K/V rows are int8."""
    if _numbers(version) < LEAST_INTEGER_ROWS:
        raise EngineError(f"ONNX Runtime {version} does not keep K/V rows of 8 bits as they are, {NEWER}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _load(
    runtime: onnxruntime, graph: Path, settings: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    return load_session(
        runtime, graph, settings, providers=["CPUExecutionProvider"], disabled_optimizers=UNWANTED["cpu"]
    )


def _settings(runtime: onnxruntime, graph: Path, options: CpuOptions) -> onnxruntime.SessionOptions:
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = options.threads or cores()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    exact = options.fuse and not sums_eight_bits()
    if exact and INT8_PRODUCT in graph.read_bytes():
        settings.add_session_config_entry(EXACT, "1")
    elif exact or not options.fuse:  # products in floating point, which are exact too
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    settings.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    register_host(settings, settings.intra_op_num_threads)
    return settings


def _packs_itself(graph: Path) -> bool:
    """Whether products of a graph are run by the host build, which packs weights of its own."""
    library, text = host_build(), graph.read_bytes()
    names = {0: b"BoundProduct", 1: INT8_PRODUCT}
    return library is not None and any(
        name in text and library.diagd_packs(kind) for kind, name in names.items()
    )


def _prepacked(runtime: onnxruntime, graph: Path, digest: str, options: CpuOptions) -> Path:
    """The graph with its weights as this machine packs them, from the cache; without one, itself."""

    def pack(folder: Path) -> None:
        settings, packed = _settings(runtime, graph, options), folder / PACKED
        settings.optimized_model_filepath = str(packed)
        settings.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        settings.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{packed.stem}.bin"
        )
        _load(runtime, graph, settings)
        if not _is_aligned(packed):
            for file in list(folder.iterdir()):
                file.unlink()

    library = host_build()
    own = sha256(Path(library._name)) if library else ""  # a packed graph has its operators
    machine = [runtime.__version__, processor_features(), own]
    parts = [digest, *machine, str(options.fuse), EXACT, *UNWANTED["cpu"]]
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
        check_values(session, {name: tensor.shape for name, tensor in tensors.items()})
        self._bindings = {width: self._bind(tensors, width, kind) for width in widths}
        self._options = {width: runtime.RunOptions() for width in widths}
        for width, options in self._options.items():
            if kind == "cuda":
                options.add_run_config_entry("gpu_graph_id", str(width))
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def enqueue(self, width: int) -> None:
        """Queue one step of ``width`` rows."""
        run_bound(self._session, self._bindings[width], self._options[width])

    def _bind(self, tensors: Mapping[str, Tensor], width: int, kind: str) -> Any:
        binding = self._session.io_binding()
        for value in self._session.get_inputs():
            tensor = tensors[value.name]
            binding.bind_input(value.name, kind, 0, tensor.dtype, tensor.at_width(width), tensor.address)
        for value in self._session.get_outputs():
            tensor = tensors[value.name]
            binding.bind_output(value.name, kind, 0, tensor.dtype, tensor.at_width(width), tensor.address)
        return binding


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
    """
    host, gpu = (installed(package) for package in ("onnxruntime", "onnxruntime-gpu"))
    if gpu is None:
        return None if CUDA in providers else f"ONNX Runtime {version} has no CUDA provider"
    if host is not None and (CUDA not in providers or version != gpu):
        return (
            f"onnxruntime {host} and onnxruntime-gpu {gpu} are both installed, in one folder; what is there "
            f"says {version} {'with' if CUDA in providers else 'without'} a CUDA provider"
        )
    if _numbers(version) < LEAST:
        least = ".".join(map(str, LEAST))
        return f"ONNX Runtime {version} is too old for step graphs on CUDA, {least} or later is needed"
    return None if CUDA in providers else f"onnxruntime-gpu {gpu} offers no CUDA provider on this machine"


def nodes_outside(session: Any, provider: str = CUDA) -> list[str]:
    """Nodes of a session that another provider runs, but for ``SIZES``, as ``operator (name)``.

    The session was made with ``session.record_ep_graph_assignment_info``; EngineError where it does not say.
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
    graph: Path,
    *,
    stream: int | None = None,
    graphs: bool = False,
    strict: bool = False,
    operators: Path | None = None,
) -> Any:
    """A session of the CUDA provider.

    Args:
        graph: the ONNX file.
        stream: handle of the stream it queues on; None: one of its own, which each run waits for.
        graphs: capture and replay CUDA graphs.
        strict: refuse a graph of which nodes are left to the CPU, so that steps would wait for it.
        operators: library of kernels that stand before the provider's.

    Raises:
        DependencyError: ONNX Runtime is not installed.
        EngineError: it has no CUDA provider, cannot load it, or refuses the graph.
    """
    runtime = require("onnxruntime", extra="cuda", purpose="run step graphs on the GPU")
    lost = _load_libraries(runtime)
    options = {
        "enable_cuda_graph": str(int(graphs)),
        "use_tf32": "0",  # else products of float32 keep ten bits of each factor
        "sdpa_kernel": str(UNFUSED),
    }
    if stream is not None:
        options["user_compute_stream"] = str(stream)
    settings = runtime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if operators:
        settings.register_custom_ops_library(str(operators))
    providers = [(CUDA, options), "CPUExecutionProvider"]
    session = load_session(
        runtime, graph, settings, providers=providers, disabled_optimizers=UNWANTED["cuda"]
    )
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
