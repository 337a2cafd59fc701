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

from diagd.engines.cuda.engine import DeviceEngine
from diagd.engines.engine import Float, SamplingState, StepInputs
from diagd.engines.fixed import FixedEngine
from diagd.errors import require
from diagd.profiling.measure import measure, random_workload
from diagd.profiling.verify import gate_of
from diagd.runtime.session import Session
from diagd.schedule import Schedule

Tensors = dict[str, NDArray[Any]]
Evaluate = Callable[[Tensors], Mapping[str, NDArray[Any]]]
"""Outputs of a step graph by name, from its inputs by name."""

DRAWN = ("next_token_buffer", "tokens")
"""Outputs that are not compared: tokens follow from the logits."""


@dataclass(frozen=True)
class TensorVerdict:
    """One output of a step: the greatest difference over the greatest value of the reference."""

    engine: str
    tensor: str
    error: float
    passed: bool


def compare_tensors(
    engine: str, evaluate: Evaluate, graph: Path, feeds: Tensors, precision: str
) -> list[TensorVerdict]:
    """Run a step on an engine, and on ONNX Runtime's CPU provider with its optimiser off.

    Args:
        engine: its name.
        evaluate: runs it.
        graph: the step graph.
        feeds: its inputs.
        precision: of the graph; its gate for the error holds for every tensor.

    Returns:
        The outputs in the graph's order.

    Raises:
        DependencyError: Polygraphy is not installed.
    """
    comparator = require("polygraphy.comparator", extra="compare", purpose="compare engines by tensor")
    logger = require("polygraphy.logger", extra="compare", purpose="compare engines by tensor").G_LOGGER
    names = [name for name in _outputs(graph) if name not in DRAWN]
    runners = [_runner("reference", plain(graph), feeds, names), _runner(engine, evaluate, feeds, names)]
    gate = gate_of(precision).error
    with logger.verbosity(logger.CRITICAL):
        results = comparator.Comparator.run(runners, data_loader=[feeds])
        reference = results[0][1][0]
        scales = {name: max(float(np.abs(reference[name]).max()), 1e-30) for name in names}
        rule = comparator.SimpleCompareFunc(
            rtol=0.0, atol={name: gate * scales[name] for name in names}, check_error_stat="max"
        )
        ((compared,),) = comparator.Comparator.compare_accuracy(results, compare_func=rule)[0].values()
    return [
        TensorVerdict(engine, name, float(compared[name].max_absdiff) / scales[name], bool(compared[name]))
        for name in names
    ]


def _outputs(graph: Path) -> list[str]:
    onnx = require("onnx", extra="compare", purpose="compare engines by tensor")
    return [value.name for value in onnx.load(graph, load_external_data=False).graph.output]


def _runner(name: str, evaluate: Evaluate, feeds: Tensors, names: list[str]) -> Any:
    """A runner of Polygraphy."""
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


def plain(graph: Path, *, optimise: bool = False) -> Evaluate:
    """ONNX Runtime's CPU provider on one thread, its optimiser off or on."""
    runtime = require("onnxruntime", extra="export", purpose="run step graphs on the CPU")
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    if not optimise:
        settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]

    def evaluate(feeds: Tensors) -> Tensors:
        arrays = {name: array for name, array in feeds.items() if name in wanted}
        return dict(zip(names, session.run(names, arrays), strict=True))

    return evaluate


def on_device(engine: DeviceEngine, graph: Path) -> Evaluate:
    """The program of an engine, over its own tensors."""
    outputs = _outputs(graph)
    return lambda feeds: engine.evaluate(feeds, outputs, len(feeds["sources"]))


def capture_feeds(session: Session, pad: Callable[[int], int]) -> Tensors:
    """Inputs of the step that decodes most cells of a serial frame behind two known ones.

    Args:
        session: over an engine of fixed capacity on the CPU.
        pad: the width in which the engine to compare runs so many rows.
    """
    engine, kept = session.engine, Tensors()
    assert isinstance(engine, FixedEngine)
    step, most = engine.step, 0

    def watch(inputs: StepInputs, sampling: SamplingState) -> Float:
        nonlocal most
        if len(inputs.decoded) > most:
            most = len(inputs.decoded)
            kept.update(_feeds(engine, inputs, pad(len(inputs.positions))))
        return step(inputs, sampling)

    engine.step = watch  # type: ignore[method-assign]
    schedule = Schedule.serial(session.layout, 1, session.manifest.schedule.row_seed)
    measure(session, schedule, random_workload(session, min(2, session.window - 1), 1), 1)
    engine.step = step  # type: ignore[method-assign]
    return kept


def _feeds(engine: FixedEngine, inputs: StepInputs, width: int) -> Tensors:
    """Tensors of a step that samples greedily; pad rows stand where the last row stands."""
    rows, scratch = len(inputs.positions), len(engine.token_buffer) - 1
    sources, positions = np.zeros(width, np.int32), np.full(width, inputs.positions[-1], np.int32)
    sinks, uniforms = np.full(width, scratch, np.int32), np.full(width, 0.5, np.float32)
    sources[:rows], positions[:rows] = inputs.sources, inputs.positions
    sinks[inputs.decoded] = inputs.sinks[inputs.decoded]
    return {
        "token_buffer": engine.token_buffer.copy(),
        "sources": sources,
        "positions": positions,
        "sinks": sinks,
        "slot_position": engine.slot_position.copy(),
        "write_index": np.array([inputs.write_index], np.int64),
        "uniforms": uniforms,
        "temperature": np.zeros((), np.float32),
        "top_k": np.zeros((), np.int32),
        "top_p": np.ones((), np.float32),
        "live": np.array([inputs.live], np.int32),
        **{f"past_{name}": buffer.copy() for name, buffer in engine.buffers.items()},
        **{name: buffer.copy() for name, buffer in engine.text.items()},
    }
