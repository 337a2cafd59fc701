"""From a bundle to a session."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diagd.bundle import Bundle, Form
from diagd.engines.engine import Engine
from diagd.engines.modern import ModernEngine
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.portable import PortableEngine
from diagd.engines.prefix import MAX_WIDTH, PrefixEngine
from diagd.errors import UsageError, unknown
from diagd.runtime.session import Session, token_places
from diagd.runtime.text import TextReader
from diagd.schedule import slots_needed

ONE_THREAD_BYTES = 32 << 20
"""Bundles below this size decode fastest on one thread: waking a second one costs more than it computes."""

COMPAT = ("mineworld",)
"""Released implementations whose cache can be reproduced."""


def load(
    path: str | Path,
    *,
    window: int | None = None,
    threads: int = 0,
    compat: str | None = None,
    prepack: bool = True,
    roll: int | None = None,
    precision: str | None = None,
    backend: str = "cpu",
) -> Session:
    """Open a bundle and make its engine ready.

    Args:
        path: a bundle made by ``diagd-export``.
        window: frames a query may see; default: the model's context. Buffers take memory for these only.
        threads: of ONNX Runtime; 0 is one for each core, or one in all for a very small model.
        compat: ``mineworld`` shows queries the unwritten slots as zero rows, as the released code does; use
            it with schedules that have ``refeed=False, keep_seeds=True``.
        prepack: keep packed weights in this machine's cache, for faster starts.
        roll: frames by which a full window slides at once, for models whose positions are absolute: they then
            feed the window again. Default: the manifest's.
        precision: of the step graph, one of those in the bundle; default: that of its first graph.
        backend: ``cpu``, ``tensorrt`` (an engine made by diagd-build) or ``cuda`` (ONNX Runtime).

    Raises:
        BundleError: the bundle is missing, damaged or altered.
        EngineError: there is no GPU, or no compiled engine fits it.
        UsageError: the window, ``roll``, ``compat`` or ``precision`` is not possible.
    """
    bundle, cpu = Bundle.open(path), CpuOptions(threads, prepack)
    return open_session(
        bundle, window=window, cpu=cpu, compat=compat, roll=roll, precision=precision, backend=backend
    )


def open_session(
    bundle: Bundle,
    *,
    window: int | None = None,
    cpu: CpuOptions | None = None,
    compat: str | None = None,
    roll: int | None = None,
    precision: str | None = None,
    backend: str = "cpu",
) -> Session:
    """A session over a bundle that is open; see ``load``."""
    bundle = bundle.at_precision(precision)
    manifest = bundle.manifest
    frames = manifest.context.frames
    window = frames if window is None else window
    if not 2 <= window <= frames:
        raise UsageError(f"window {window} is outside 2..{frames}, the context of {manifest.name}")
    if compat is not None and compat not in COMPAT:
        raise unknown("compat", compat, COMPAT)
    cpu = with_threads(cpu or CpuOptions(), bundle)
    if backend == "cpu":
        engine = _make_engine(bundle, window, cpu, compat is not None)
    else:
        engine = _make_gpu_engine(bundle, backend)
    text = TextReader(bundle, manifest.text, cpu) if manifest.text else None
    return Session(manifest, engine, window, zero_slots=compat is not None, roll=roll, text=text)


def with_threads(cpu: CpuOptions, bundle: Bundle) -> CpuOptions:
    """One thread for a model that fits in a core's reach: its products are too short to share."""
    small = sum(record.bytes for record in bundle.manifest.files.values()) < ONE_THREAD_BYTES
    return replace(cpu, threads=1) if small and not cpu.threads else cpu


def _make_engine(bundle: Bundle, window: int, cpu: CpuOptions, zero_slots: bool) -> Engine:
    layout = bundle.manifest.layout
    places = token_places(layout, window).size
    forms = {graph.form for graph in bundle.manifest.graphs}
    if Form.PREFIX not in forms:
        return (ModernEngine if Form.MODERN in forms else PortableEngine)(bundle, places, cpu)
    zero_rows = layout.frame_start(window) if zero_slots else 0
    return PrefixEngine(bundle, slots_needed(layout, window, MAX_WIDTH) + zero_rows, places, cpu)


def _make_gpu_engine(bundle: Bundle, backend: str) -> Engine:
    from diagd.engines.gpu import BACKENDS, open_gpu_engine

    if backend not in BACKENDS:
        raise unknown("backend", backend, ("cpu", *BACKENDS))
    manifest = bundle.manifest
    places = token_places(manifest.layout, manifest.context.frames).size
    return open_gpu_engine(bundle, places, backend)
