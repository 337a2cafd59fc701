"""The graph in floating point that a bundle is calibrated and judged by, and engines of it on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from numpy.typing import DTypeLike

from diagd.bundle import Bundle, Form, Manifest
from diagd.bundle.manifest import StepGraph
from diagd.bundle.precision import FLOATING
from diagd.engines import host
from diagd.engines.backend import find
from diagd.engines.engine import Engine
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.runtime.load import step_options
from diagd.schedule import slots_needed

FORMS = tuple(Form)
"""The prefix form first: it is the quickest on the CPU, and the only one in float32 throughout."""


WINDOW = 4
"""Frames of the sessions: enough for overlapping frames, few enough to slide soon."""


def find_reference(bundle: Bundle, forms: Sequence[Form] = FORMS) -> tuple[StepGraph, ...]:
    """The graphs of one form in floating point, one for each width; earlier ``forms`` are preferred.

    Raises:
        UsageError: there is none.
    """
    for form in forms:
        found = tuple(g for g in bundle.manifest.graphs if g.form is form and g.precision in FLOATING)
        if found:
            return found
    raise UsageError(
        f"{bundle.path} has no graph in floating point to calibrate with; export it again with --form prefix"
    )


def session_window(manifest: Manifest, graphs: Sequence[StepGraph]) -> int:
    """Frames of the sessions, fewer where the graphs have no slots for so many.

    Raises:
        UsageError: they do not hold two frames.
    """
    wanted, graph = min(manifest.context.frames, WINDOW), graphs[0]
    if graph.capacity is None:
        return wanted
    layout, widest = manifest.layout, widest_step(graphs) or 0
    for window in range(wanted, 1, -1):
        if slots_needed(layout, window, widest) <= graph.capacity:
            return window
    raise UsageError(
        f"{graph.file} has {graph.capacity} slots, too few for 2 frames; export it again with a larger "
        "--set window"
    )


def widest_step(graphs: Sequence[StepGraph]) -> int | None:
    """Rows of the widest step that the graphs take; None where their width is free."""
    widths = [graph.width for graph in graphs if graph.width]
    return max(widths) if widths else None


def check_memory(bundle: Bundle, graph: StepGraph, engines: int, available: int | None) -> None:
    """Refuse engines that would be killed for memory; each keeps its weights in float32, as the CPU computes.

    Args:
        bundle: the graph lies in.
        graph: in floating point.
        engines: how many are open at once.
        available: bytes; None: not known.

    Raises:
        UsageError: they need more than is available.
    """
    itemsize = 2 if graph.precision == "fp16" else 4
    needed = engines * graph.weights.bytes * 4 // itemsize
    host.check_memory(
        needed,
        available,
        f"decoding with {graph.file} on this machine",
        "calibrate on a larger machine, or give --budget none, which judges nothing and needs no run for "
        "weight-only schemes",
    )


def open_graphs(
    bundle: Bundle,
    graphs: Sequence[StepGraph],
    window: int,
    options: CpuOptions,
    watch: Mapping[str, tuple[int, DTypeLike] | None] | None = None,
) -> Engine:
    """An engine of graphs of one form on the processor; those of a bundle's other graphs are left alone."""
    only = Bundle(bundle.path, bundle.manifest.model_copy(update={"graphs": tuple(graphs)}))
    opening = step_options(bundle.manifest, window, cpu=options, form=graphs[0].form)
    return find("cpu").open_steps(only, replace(opening, watch=watch))
