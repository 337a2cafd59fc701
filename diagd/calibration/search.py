"""For each projection: how far its outliers move into the weight, where it clips, and what that costs.

Statistics of the activations come from a bundle's own graph, along real schedules.

Migration (SmoothQuant, arXiv 2211.10438): x @ W = (x / s) @ (s W) with s_j = max|x_j|^a / max|W_j|^(1 - a).
With weight-only schemes the same search protects the channels that matter (AWQ, arXiv 2306.00978).

In K/V rows of 8 bits every channel of every head has one scale, symmetric around zero, found along the same
schedules as the ranges of activations. A row is rounded before anything attends to it, its own step included:
what a query sees does not depend on how rows were batched into steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from diagd.bundle import Bundle, Form, Manifest
from diagd.bundle.files import atomic_file
from diagd.bundle.manifest import RotaryContext, StepGraph
from diagd.bundle.precision import FLOATING, KV_CACHES, Precision
from diagd.calibration.matrices import Array, ranges, rounded_rows, rounded_weight
from diagd.calibration.options import CalibrationOptions
from diagd.calibration.report import CacheReport
from diagd.calibration.trajectory import CalibrationSet, Rollouts, open_graphs
from diagd.engines.engine import Float
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.tensors import cache_tensors
from diagd.errors import EngineError, QualityError, UsageError, unknown
from diagd.export.exporter import TORCH_TYPES
from diagd.export.step_graph import WATCHED, Projection, StepVariant, trace_step, watched_values
from diagd.export.tracing import save
from diagd.export.weights import StoredWeights
from diagd.progress import Progress
from diagd.runtime.step import Result
from diagd.schedule import Step

GRAPH_NAME = "observed.onnx"

SAMPLE_ROWS = 256
"""Rows of each input that are kept: enough for the error of a product to a few per cent."""

ALPHAS = (None, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
COLUMNS = 512
"""Columns of a weight on which a search measures its error."""

SYNTHETIC_ROWS = 64

CACHE_FORMS = (Form.PREFIX, Form.PORTABLE)
"""Forms that quantised rows can be judged by; the prefix form, which is quicker, only rounds them."""

LEVELS = 127

HEADROOM = 1.25
"""Reach of a scale over the largest magnitude seen: a key cut off costs more than 2 dB of rounding."""

SMALLEST_SCALE = 2.0**-14
"""Smallest normal number of float16."""


def observe(
    bundle: Bundle, graphs: Sequence[StepGraph], samples: CalibrationSet, progress: Progress, threads: int = 0
) -> dict[str, InputStatistics]:
    """Decode every trajectory with a bundle's graph; watch the inputs of products and the K/V rows.

    A graph is added beside the files of the bundle, a writable copy, and removed again; QualityError where an
    activation is not finite.
    """
    manifest, graph, path = bundle.manifest, graphs[0], bundle.file(GRAPH_NAME)
    values = watched_values(manifest.transformer, graph.form)
    cached = cache_tensors(manifest.cache.layers) if graph.form.traits.rows_out else []
    rows = dict.fromkeys(cached, manifest.cache.kv_heads * manifest.cache.head_size)
    seen = {name: InputStatistics.empty(width) for name, width in (values | rows).items()}
    dtype = np.float16 if graph.precision == "fp16" else np.float32
    watch: dict[str, tuple[int, DTypeLike] | None] = {f"new_{name}": None for name in cached}
    watch |= {f"{WATCHED}{name}": (size, dtype) for name, size in values.items()}
    watched = [graph.model_copy(update={"file": GRAPH_NAME, "streams": 1}) for graph in graphs]
    options = CpuOptions(threads, prepack=False)
    traced = trace_step(
        manifest.transformer,
        graph.form,
        dtype=TORCH_TYPES[graph.precision],
        capacity=graph.capacity or 0,
        variant=StepVariant(watch=True),
    )
    save(traced, StoredWeights(bundle).tensors(), path)
    try:
        with closing(open_graphs(bundle, watched, samples.window, options, watch)) as engine:
            rollouts = Rollouts(bundle, engine, samples)
            for number, trajectory in enumerate(progress.each(samples.trajectories, "calibration")):
                _add_seen(seen, rollouts.steps(trajectory, number), samples.seed)
    finally:
        path.unlink(missing_ok=True)
    return seen


def _add_seen(seen: Mapping[str, InputStatistics], steps: Iterable[tuple[Step, Result]], seed: int) -> None:
    try:
        for _, result in steps:
            for name, found in map(_named, result.watched.items()):
                seen[name].add(name, found, seed)
    except EngineError as error:  # of the sampler, ahead of whoever watches
        raise QualityError(f"activations are no finite numbers: {error}") from error


def _named(watched: tuple[str, NDArray[Any]]) -> tuple[str, Float]:
    """What was watched in a step, float32 [rows, ...], and what it is called in statistics."""
    output, values = watched
    if output.startswith(WATCHED):
        return output.removeprefix(WATCHED), values.astype(np.float32)
    return output.removeprefix("new_"), values[0].swapaxes(0, 1).astype(np.float32)


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
    steps: int = 0

    @classmethod
    def empty(cls, channels: int) -> InputStatistics:
        """Nothing seen yet."""
        sample = np.zeros((0, channels), np.float32)
        return cls(np.zeros(channels, np.float32), np.zeros(channels), 0, sample, np.zeros(0))

    def add(self, name: str, values: Float, seed: int) -> None:
        """Take [n, channels...] of a step; what stays depends on ``seed``, not on how rows are batched.

        Raises:
            QualityError: a value is not finite; it tells the ``name``.
        """
        self.steps += 1
        if not len(values):
            return
        rows = values.reshape(len(values), -1)
        if not np.isfinite(rows).all():
            raise QualityError(
                f"the input of {name} has values that are no finite numbers in step {self.steps}; "
                "expected finite activations: check the checkpoint, then export it again"
            )
        keys = row_keys(seed, self.rows, len(rows))
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


@dataclass(frozen=True)
class Choice:
    """What a search found for one projection.

    Attributes:
        alpha: of the migration; None without.
        factors: float32 [K], s: rows of the weight are multiplied by it; None without migration.
        limit: range of static activations; None where there is none.
        signal_to_noise: of the product on the sample rows, dB.
    """

    alpha: float | None
    factors: Float | None
    limit: float | None
    signal_to_noise: float


def search(
    projection: Projection, weight: Array, seen: InputStatistics | None, scheme: Precision, grouped: bool
) -> Choice:
    """Try every alpha and range, and keep those whose product is nearest.

    ``weight``: float [K, N]. ``seen``: its input while decoding; None where the scheme needs none.
    ``grouped``: 8-bit weights have groups.
    """
    columns = np.linspace(0, weight.shape[1] - 1, min(COLUMNS, weight.shape[1])).astype(int)
    part = np.asarray(weight[:, columns], np.float32)
    rows = _rows(seen, projection.inputs)
    exact = rows @ part
    tried = []
    for alpha in ALPHAS if projection.fold is not None and seen is not None else (None,):
        factors = None if alpha is None or seen is None else migration(seen.absmax, weight, alpha)
        moved, scaled = (rows, part) if factors is None else (rows / factors, part * factors[:, None])
        rounded = rounded_weight(scaled, scheme, grouped)
        for limit in ranges(moved.ravel()) if scheme.scaling == "static" else [None]:
            product = rounded_rows(moved, limit, scheme) @ rounded
            tried.append(Choice(alpha, factors, limit, decibels(exact, product)))
    return max(tried, key=lambda choice: choice.signal_to_noise)


def migration(absmax: Float, weight: Array, alpha: float) -> Float:
    """Factors float32 [K], geometric mean 1; channels that are never used keep 1."""
    reach = np.concatenate(
        [np.abs(weight[start : start + 256]).max(axis=1) for start in range(0, len(weight), 256)]
    )
    used = (absmax > 0) & (reach > 0)
    logs = np.zeros(len(absmax))
    logs[used] = alpha * np.log(absmax[used]) - (1 - alpha) * np.log(reach[used].astype(np.float64))
    logs[used] -= logs[used].mean() if used.any() else 0
    return np.exp(logs).astype(np.float32)


def decibels(exact: Array, near: Array) -> float:
    """Signal to noise of ``near``."""
    noise = float(np.square(near - exact, dtype=np.float64).sum())
    signal = float(np.square(exact, dtype=np.float64).sum())
    return 10 * float(np.log10(max(signal, 1e-30) / max(noise, 1e-30)))


def _rows(seen: InputStatistics | None, channels: int) -> Float:
    """Sample rows; without them, normal ones of each channel's power."""
    if seen is not None and len(seen.sample):
        return seen.sample
    rows = np.random.default_rng(0).standard_normal((SYNTHETIC_ROWS, channels), dtype=np.float32)
    return rows if seen is None else rows * np.sqrt(seen.mean_square)


def check_kv_cache(bundle: Bundle, options: CalibrationOptions) -> None:
    """Refuse a cache that is unknown, or that no portable graph of the bundle can have with the scheme."""
    if (kv_cache := options.kv_cache) is None:
        return
    if kv_cache not in KV_CACHES:
        raise unknown("K/V cache", kv_cache, KV_CACHES)
    if not any(g.form.traits.float_cache is None and g.precision in FLOATING for g in bundle.manifest.graphs):
        raise UsageError(
            f"{bundle.path} has no portable graph, the only form whose cache can be {kv_cache}: the modern "
            "form's TensorScatter takes floating point only, and the prefix form attends to its buffers as "
            "they lie; export it again with --form prefix,portable"
        )
    if options.refusal(Form.PORTABLE):
        raise UsageError(
            f"{options.precision} is for the prefix form, a cache of {kv_cache} for the portable form: "
            "choose another --precision, such as int8"
        )


def row_scales(seen: Mapping[str, InputStatistics], manifest: Manifest) -> dict[str, Float]:
    """Scales of each K/V tensor, float32 [G, D]: a row is stored as ``row / scale``.

    The two channels that a rotary embedding turns into each other share a scale that holds both at any
    angle: positions further on than the run has seen stay in range, and cached keys are turned as integers.
    """
    cache, scales = manifest.cache, {}
    for name in cache_tensors(cache.layers):
        reach = seen[name].absmax.reshape(cache.kv_heads, cache.head_size)
        if name.startswith("key") and isinstance(manifest.context, RotaryContext):
            reach = np.tile(np.hypot(*np.split(reach, 2, axis=1)), 2)
        scales[name] = np.maximum(reach * (HEADROOM / LEVELS), SMALLEST_SCALE).astype(np.float32)
    return scales


def describe_cache(
    scales: Mapping[str, Float], seen: Mapping[str, InputStatistics], manifest: Manifest, kv_cache: str
) -> CacheReport:
    """Bytes of a token before and after, and signal to noise of its rows."""
    elements = sum(scale.size for scale in scales.values())
    rounded = {
        name: np.clip(np.rint(seen[name].sample / scale.ravel()), -LEVELS - 1, LEVELS) * scale.ravel()
        for name, scale in scales.items()
    }
    return CacheReport(
        dtype=kv_cache,
        bytes_before=elements * np.dtype(manifest.cache.dtype).itemsize,
        bytes_after=elements * np.dtype(kv_cache).itemsize,
        signal_to_noise={name: decibels(seen[name].sample, rows) for name, rows in rounded.items()},
    )
