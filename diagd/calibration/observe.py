"""Statistics of a bundle's activations, gathered by its own graph along real schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from diagd.bundle import Bundle
from diagd.bundle.files import atomic_file
from diagd.bundle.manifest import StepGraph
from diagd.calibration.matrices import StoredWeights
from diagd.calibration.trajectory import CalibrationSet, Rollouts, open_graphs
from diagd.engines.engine import Float
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.tensors import cache_tensors
from diagd.errors import EngineError, QualityError
from diagd.export.exporter import TORCH_TYPES
from diagd.export.step_graph import WATCHED, StepVariant, trace_step, watched_values
from diagd.export.tracing import link_weights, save
from diagd.progress import Progress

GRAPH_NAME = "observed.onnx"

SAMPLE_ROWS = 256
"""Rows of each input that are kept: enough for the error of a product to a few per cent."""


def observe(
    bundle: Bundle,
    graphs: Sequence[StepGraph],
    samples: CalibrationSet,
    progress: Progress,
    threads: int = 0,
) -> dict[str, InputStatistics]:
    """Decode every trajectory with a bundle's graph; watch the inputs of products and the K/V rows.

    A graph is added beside the files of the bundle, a writable copy, and removed again.

    Raises:
        QualityError: an activation is not finite.
    """
    manifest, graph, path = bundle.manifest, graphs[0], bundle.file(GRAPH_NAME)
    values = watched_values(manifest.transformer, graph.form)
    cached = cache_tensors(manifest.cache.layers) if graph.form.traits.rows_out else []
    rows = dict.fromkeys(cached, manifest.cache.kv_heads * manifest.cache.head_size)
    collector = StatisticsCollector(values | rows, samples.seed)
    dtype = np.float16 if graph.precision == "fp16" else np.float32
    watch: dict[str, tuple[int, DTypeLike] | None] = {f"new_{name}": None for name in cached}
    watch |= {f"{WATCHED}{name}": (size, dtype) for name, size in values.items()}
    watched = [graph.model_copy(update={"file": GRAPH_NAME, "streams": 1}) for graph in graphs]
    options = CpuOptions(threads, prepack=False)
    _save_watched(bundle, graph, path)
    try:
        with closing(open_graphs(bundle, watched, samples.window, options, watch)) as engine:
            rollouts = Rollouts(bundle, engine, samples)
            with progress.count("calibration", len(samples.trajectories)) as advance:
                for number, trajectory in enumerate(samples.trajectories):
                    for _, result in rollouts.steps(trajectory, number):
                        collector.add(dict(map(_named, result.watched.items())))
                    advance(1)
    except EngineError as error:  # of the sampler, ahead of whoever watches
        raise QualityError(f"activations are no finite numbers: {error}") from error
    finally:
        path.unlink(missing_ok=True)
    return collector.inputs


def _named(watched: tuple[str, NDArray[Any]]) -> tuple[str, Float]:
    """What was watched in a step, float32 [rows, ...], and what it is called in statistics."""
    output, values = watched
    if output.startswith(WATCHED):
        return output.removeprefix(WATCHED), values.astype(np.float32)
    return output.removeprefix("new_"), values[0].swapaxes(0, 1).astype(np.float32)


def _save_watched(bundle: Bundle, graph: StepGraph, path: Path) -> None:
    model = trace_step(
        bundle.manifest.transformer,
        graph.form,
        dtype=TORCH_TYPES[graph.precision],
        capacity=graph.capacity or 0,
        variant=StepVariant(watch=True),
    )
    save(link_weights(model, StoredWeights(bundle).tensors()), path)


@dataclass
class InputStatistics:
    """The input of one projection, [rows, K] over all steps.

    Attributes:
        absmax: float32 [K], largest magnitude of each channel over every row.
        power: float64 [K], sum of squares of each channel.
        rows: how many were seen.
        sample: float32 [n, K], n at most ``SAMPLE_ROWS``: the rows of lowest key, in order of it.
    """

    absmax: Float
    power: NDArray[np.float64]
    rows: int
    sample: Float
    keys: NDArray[np.float64]

    @classmethod
    def empty(cls, channels: int) -> InputStatistics:
        """Nothing seen yet."""
        sample = np.zeros((0, channels), np.float32)
        return cls(np.zeros(channels, np.float32), np.zeros(channels), 0, sample, np.zeros(0))

    def add(self, rows: Float, keys: NDArray[np.float64]) -> None:
        """Take rows [n, K]; ``keys`` [n] decide which stay, so that batching does not."""
        self.absmax = np.maximum(self.absmax, np.abs(rows).max(axis=0))
        self.power += np.square(rows, dtype=np.float64).sum(axis=0)
        self.rows += len(rows)
        keep = keys <= (self.keys[-1] if len(self.keys) == SAMPLE_ROWS else np.inf)
        if not keep.any():
            return
        keys = np.concatenate([self.keys, keys[keep]])
        order = np.argsort(keys, kind="stable")[:SAMPLE_ROWS]
        self.sample = np.concatenate([self.sample, rows[keep]])[order]
        self.keys = keys[order]

    @property
    def mean_square(self) -> Float:
        """float32 [K], mean square of each channel."""
        return (self.power / max(self.rows, 1)).astype(np.float32)


class StatisticsCollector:
    """Gathers the statistics of every projection's input.

    ``channels``: width of each input, by the weight's name. ``seed``: of the choice of sample rows.
    """

    def __init__(self, channels: Mapping[str, int], seed: int) -> None:
        self.inputs = {name: InputStatistics.empty(width) for name, width in channels.items()}
        self._seed = seed
        self.steps = 0

    def add(self, activations: Mapping[str, Float]) -> None:
        """Take the inputs of one step, [rows, ...]; all but the first axis are channels.

        Raises:
            QualityError: one is not finite.
        """
        self.steps += 1
        for name, values in activations.items():
            if not len(values):
                continue
            rows = values.reshape(len(values), -1)
            if not np.isfinite(rows).all():
                raise QualityError(
                    f"the input of {name} has values that are no finite numbers in step {self.steps}; "
                    "expected finite activations: check the checkpoint, then export it again"
                )
            seen = self.inputs[name]
            seen.add(rows, row_keys(self._seed, seen.rows, len(rows)))


def row_keys(seed: int, first: int, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) of rows ``first``...; each depends on the seed and its own index only."""
    index = np.arange(first, first + count, dtype=np.uint64)
    state = index + np.full(count, seed, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    keys: NDArray[np.float64] = (state ^ (state >> np.uint64(31))) / 2.0**64
    return keys


def save_statistics(path: Path, inputs: Mapping[str, InputStatistics]) -> None:
    """Write what quantisation needs again, without the sample rows: .npz of ``NAME.absmax``, ``.power``."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, seen in inputs.items():
        arrays[f"{name}.absmax"], arrays[f"{name}.power"] = seen.absmax, seen.power
        arrays[f"{name}.rows"] = np.asarray(seen.rows)
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_statistics(path: Path) -> dict[str, InputStatistics]:
    """Read ``save_statistics``; sample rows are empty."""
    with np.load(path, allow_pickle=False) as arrays:
        names = [name.removesuffix(".absmax") for name in arrays.files if name.endswith(".absmax")]
        return {
            name: replace(
                InputStatistics.empty(len(arrays[f"{name}.absmax"])),
                absmax=arrays[f"{name}.absmax"],
                power=arrays[f"{name}.power"],
                rows=int(arrays[f"{name}.rows"]),
            )
            for name in names
        }
