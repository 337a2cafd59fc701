"""One step graph on two engines: every output of one real step against ONNX Runtime's, by Polygraphy.

Where an engine fails its gate, its cells say so; the tensors of a step say in which layer it begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Int
from diagd.engines.executor import Executor
from diagd.engines.onnxruntime_session import open_plainly
from diagd.errors import require
from diagd.profiling.measure import random_workload
from diagd.runtime.decoders import ScheduledDecoder
from diagd.runtime.session import Session
from diagd.schedule import NO_SINK, Schedule

Tensors = dict[str, NDArray[Any]]
Evaluate = Callable[[Tensors], Mapping[str, NDArray[Any]]]
"""Outputs of a step graph by name, from its inputs by name."""


@dataclass(frozen=True)
class TensorVerdict:
    """One output of a step: the greatest difference over the greatest value of the reference."""

    engine: str
    tensor: str
    error: float
    passed: bool


def compare_tensors(
    engine: str, evaluate: Evaluate, reference: PlainGraph, feeds: Tensors, bound: float
) -> list[TensorVerdict]:
    """Run a step on an engine, and on ONNX Runtime's CPU provider with its optimiser off.

    ``bound`` is of the greatest difference over the greatest value of the reference, for every tensor.

    Returns:
        The outputs in the graph's order.

    Raises:
        DependencyError: Polygraphy is not installed.
    """
    comparator = require("polygraphy.comparator", extra="compare", purpose="compare engines by tensor")
    logger = require("polygraphy.logger", extra="compare", purpose="compare engines by tensor").G_LOGGER
    names = reference.outputs
    runners = [_runner("reference", reference, feeds, names), _runner(engine, evaluate, feeds, names)]
    with logger.verbosity(logger.CRITICAL):
        results = comparator.Comparator.run(runners, data_loader=[feeds])
        right = results[0][1][0]
        scales = {name: max(float(np.abs(right[name]).max()), 1e-30) for name in names}
        rule = comparator.SimpleCompareFunc(
            rtol=0.0, atol={name: bound * scales[name] for name in names}, check_error_stat="max"
        )
        ((compared,),) = comparator.Comparator.compare_accuracy(results, compare_func=rule)[0].values()
    return [
        TensorVerdict(engine, name, float(compared[name].max_absdiff) / scales[name], bool(compared[name]))
        for name in names
    ]


def _runner(name: str, evaluate: Evaluate, feeds: Tensors, names: list[str]) -> Any:
    base = require("polygraphy.backend.base", extra="compare", purpose="compare engines by tensor")
    common = require("polygraphy.common", extra="compare", purpose="compare engines by tensor")

    class Runner(base.BaseRunner):  # type: ignore[misc, name-defined]
        def get_input_metadata_impl(self) -> Any:
            metadata = common.TensorMetadata()
            for tensor, array in feeds.items():
                metadata.add(tensor, array.dtype, array.shape)
            return metadata

        def infer_impl(self, feed_dict: Tensors) -> Tensors:
            began = time.perf_counter()
            outputs = evaluate(feed_dict)
            self.inference_time = time.perf_counter() - began
            return {tensor: outputs[tensor].astype(np.float32) for tensor in names}

    return Runner(name=name)


class PlainGraph:
    """A step graph on one thread of ONNX Runtime's CPU provider with its optimiser off.

    Attributes:
        outputs: names, in the graph's order.
    """

    def __init__(self, graph: Path) -> None:
        self._session = open_plainly(graph)
        self._inputs = {value.name for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, feeds: Tensors) -> Tensors:
        """All outputs; arrays that the graph does not take are left out."""
        arrays = {name: array for name, array in feeds.items() if name in self._inputs}
        return dict(zip(self.outputs, self._session.run(self.outputs, arrays), strict=True))


def capture_feeds(session: Session, engine: Executor, pad: Callable[[Int], Int]) -> Tensors:
    """Inputs of the step that decodes most cells of a serial frame behind two known ones.

    ``pad`` gives the widths in which the engine to compare runs so many rows.
    """
    layout, workload = session.layout, random_workload(session, min(2, session.window - 1), 1)
    schedule = Schedule.serial(layout, 1, session.manifest.schedule.row_seed)
    kept, most, rows = Tensors(), 0, 0
    for step, _ in session.steps(ScheduledDecoder(schedule), workload.start(session, 1), count=1):
        if (decoded := int((step.sinks != NO_SINK).sum())) > most:
            kept, most, rows = engine.inputs(), decoded, step.width
    return _padded(kept, rows, int(pad(np.array([rows], np.int32))[0]))


def _padded(feeds: Tensors, rows: int, width: int) -> Tensors:
    """The same step at another width; pad rows are as ``advance`` of the kernels makes them."""
    pads = {"sources": 0, "positions": feeds["positions"][rows - 1]}
    return feeds | {
        name: np.append(feeds[name][:rows], np.full(width - rows, pad, feeds[name].dtype))
        for name, pad in pads.items()
    }
