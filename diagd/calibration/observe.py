"""Statistics of a bundle's activations, gathered by its own graph along real schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from diagd.bundle import Bundle
from diagd.bundle.manifest import StepGraph
from diagd.calibration.reference import open_graphs
from diagd.calibration.statistics import InputStatistics, StatisticsCollector
from diagd.calibration.stored import StoredWeights
from diagd.calibration.trajectory import CalibrationSet, Rollouts
from diagd.engines.buffers import cache_tensors
from diagd.engines.engine import Float
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import EngineError, QualityError
from diagd.export.exporter import TORCH_TYPES
from diagd.export.step_graph import PLAIN, WATCHED, StepVariant, trace_step, watched_values
from diagd.export.tracing import link_weights, save
from diagd.progress import Progress

GRAPH_NAME = "observed.onnx"


def observe(
    bundle: Bundle,
    graphs: Sequence[StepGraph],
    samples: CalibrationSet,
    progress: Progress,
    threads: int = 0,
) -> dict[str, InputStatistics]:
    """Decode every trajectory with a bundle's graph; watch the inputs of products and the K/V rows.

    Args:
        bundle: writable copy; a graph is added beside its files and removed again.
        graphs: of one form in floating point.
        samples: what is decoded; its seed is that of the sampled rows as well.
        progress: where to report.
        threads: of ONNX Runtime.

    Raises:
        QualityError: an activation is not finite.
    """
    cache, form = bundle.manifest.cache, graphs[0].form
    sizes = dict(watched_values(bundle.manifest.transformer, form))
    outputs = {name: f"{WATCHED}{name}" for name in sizes}
    cached = cache_tensors(cache) if form.traits.rows_out else []
    sizes |= dict.fromkeys(cached, cache.kv_heads * cache.head_size)
    collector, path = StatisticsCollector(sizes, samples.seed), bundle.file(GRAPH_NAME)
    _save_watched(bundle, graphs[0], path)
    alone = [graph.model_copy(update={"file": GRAPH_NAME, "streams": 1}) for graph in graphs]
    manifest = bundle.manifest.model_copy(update={"graphs": tuple(alone)})
    watched, engine = Bundle(bundle.path, manifest), None
    dtype = np.float16 if graphs[0].precision == "fp16" else np.float32
    watch: dict[str, tuple[int, DTypeLike] | None] = {f"new_{name}": None for name in cached}
    watch |= {output: (sizes[name], dtype) for name, output in outputs.items()}
    try:
        options = CpuOptions(threads, prepack=False)
        engine = open_graphs(watched, manifest.graphs, samples.window, options, watch)
        rollouts = Rollouts(watched, engine, samples)
        with progress.count("calibration", len(samples.trajectories)) as advance:
            for number, trajectory in enumerate(samples.trajectories):
                for _, result in rollouts.steps(trajectory, number):
                    collector.add(_by_name(result.watched, outputs, cached))
                advance(1)
    except EngineError as error:  # of the sampler, ahead of whoever watches
        raise QualityError(f"activations are no finite numbers: {error}") from error
    finally:
        path.unlink(missing_ok=True)
        if engine is not None:
            engine.close()
    return collector.inputs


def _by_name(
    values: Mapping[str, NDArray[Any]], outputs: Mapping[str, str], cached: Sequence[str]
) -> dict[str, Float]:
    """What was watched in a step, float32 [rows, ...] by what it is called in statistics."""
    found = {name: values[output].astype(np.float32) for name, output in outputs.items()}
    return found | {name: values[f"new_{name}"][0].swapaxes(0, 1).astype(np.float32) for name in cached}


def _save_watched(bundle: Bundle, graph: StepGraph, path: Path) -> None:
    model = trace_step(
        bundle.manifest.transformer,
        graph.form,
        dtype=TORCH_TYPES[graph.precision],
        capacity=graph.capacity or 0,
        variant=StepVariant(watch=True),
    )
    tensors = StoredWeights(bundle).tensors()
    save(link_weights(model, tensors | {name + PLAIN: tensors[name] for name in tensors}), path)
