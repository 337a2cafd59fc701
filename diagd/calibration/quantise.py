"""A bundle to the same bundle with quantised step graphs, accepted by a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diagd.bundle import Bundle, Form, seal
from diagd.bundle.manifest import StepGraph
from diagd.calibration.gate import Budget, Comparison, PairedEngine, failures
from diagd.calibration.kv_cache import check_kv_cache, describe_cache, precision_name, row_scales
from diagd.calibration.kv_rewrite import quantise_cache
from diagd.calibration.nodes import check_form
from diagd.calibration.observe import observe
from diagd.calibration.projections import Projection, StoredWeights, load_graph, projections
from diagd.calibration.ranges import find_range
from diagd.calibration.report import Report, write_report
from diagd.calibration.rewrite import Rewriter
from diagd.calibration.schemes import Scheme, find_scheme
from diagd.calibration.search import Choice, search
from diagd.calibration.statistics import InputStatistics, load_statistics, save_statistics
from diagd.calibration.trajectory import Prompts, Tour, Trajectory, capacity, default_window, trajectories
from diagd.calibration.weights_file import WeightsFile
from diagd.calibration.workspace import workspace
from diagd.engines.engine import Float, Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import PrefixEngine
from diagd.errors import QualityError, UsageError
from diagd.progress import Progress
from diagd.runtime.pixels import PixelCodec

DIRECTORY = "calibration"
STATISTICS = f"{DIRECTORY}/statistics.npz"
SENSITIVITY_STEPS = 32
"""Passes on which each layer is measured by itself."""

GATE_SEED = 1_000_003
"""Added to the seed, so that a model is judged on other frames than its ranges were found on."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        precision: name of the scheme.
        budget: what may be lost.
        steps: passes of the calibration run, and of the gate.
        seed: of prompts, actions, sampling and kept rows.
        range: rule for static activations.
        floor: signal to noise of a layer below which it stays in floating point, dB; None: the scheme's.
        threads: of ONNX Runtime; 0 is one for each core.
        sensitivity: also measure what each layer costs when it alone is quantised.
        kv_cache: element type of the K/V buffers, ``int8``; None leaves them in floating point.
    """

    precision: str
    budget: Budget = field(default_factory=Budget)
    steps: int = 320
    seed: int = 0
    range: str = "percentile"
    floor: float | None = None
    threads: int = 0
    sensitivity: bool = False
    kv_cache: str | None = None

    @property
    def name(self) -> str:
        """Precision of the graphs that are written."""
        return precision_name(self.precision, self.kv_cache)


def calibrate(
    bundle: Bundle, options: CalibrationOptions, frames: Int | None = None, progress: Progress | None = None
) -> Report:
    """Add quantised graphs to a bundle, in place and all at once.

    Args:
        bundle: with an FP32 prefix graph.
        options: what to do.
        frames: int32 [P, rows, columns], known frames that prompts are cut from.
        progress: where to report.

    Raises:
        UsageError: the bundle has the precision already or no FP32 prefix graph, there are no frames for a
            trained model, too few steps, or a name is unknown.
        QualityError: an activation is not finite, or the result is outside the budget; the bundle is
            unchanged, and the error carries the report.
    """
    scheme = find_scheme(options.precision)
    reference = _check(bundle, scheme, options, frames)
    with workspace(bundle) as copy:
        work = _Calibration(copy, scheme, options, reference, frames, progress or Progress())
        report = work.run()
        if report.failures:
            raise RejectedError(report)
        seal(copy.path, work.manifest())
    return report


class RejectedError(QualityError):
    """A quantised model outside its budget; ``report`` says how far."""

    def __init__(self, report: Report) -> None:
        super().__init__(
            f"{report.precision} is outside its budget: {'; '.join(report.failures)}; the bundle is "
            "unchanged. "
            "Keep more layers in floating point (--set floor=DB), choose another --precision, "
            "or allow more with --budget"
        )
        self.report = report


def _check(bundle: Bundle, scheme: Scheme, options: CalibrationOptions, frames: Int | None) -> StepGraph:
    manifest = bundle.manifest
    find_range(options.range)
    trajectories(manifest, default_window(manifest), options.steps)
    check_kv_cache(bundle, scheme, options.kv_cache)
    if any(graph.precision == options.name for graph in manifest.graphs):
        raise UsageError(f"{bundle.path} has {options.name} graphs already; export it again to start afresh")
    reference = next((g for g in manifest.graphs if g.form is Form.PREFIX and g.precision == "fp32"), None)
    if reference is None:
        raise UsageError(
            f"{bundle.path} has no fp32 prefix graph to calibrate with; export it with --form prefix"
        )
    if frames is None and manifest.provenance.random_seed is None:
        raise UsageError(
            f"{manifest.name} is a trained model: its ranges and its quality need real frames; "
            "give --data VIDEO or --data TOKENS.npy"
        )
    return reference


class _Calibration:
    """One run over a writable copy of a bundle."""

    def __init__(
        self,
        bundle: Bundle,
        scheme: Scheme,
        options: CalibrationOptions,
        reference: StepGraph,
        frames: Int | None,
        progress: Progress,
    ) -> None:
        self._bundle, self._scheme, self._options = bundle, scheme, options
        self._reference, self._progress = reference, progress
        self._window = default_window(bundle.manifest)
        self._tour = trajectories(bundle.manifest, self._window, options.steps)
        self._prompts = Prompts(bundle.manifest, frames)
        self._graphs: list[StepGraph] = []
        self._layers: list[dict[str, Any]] = []
        self._row_scales: dict[str, Float] = {}
        self._kv_cache: dict[str, Any] | None = None

    def run(self) -> Report:
        """Statistics, search, graphs, gate, report."""
        (self._bundle.path / DIRECTORY).mkdir(exist_ok=True)
        statistics = self._statistics()
        self._scale_cache(statistics)
        choices = self._choose(statistics)
        self._write_graphs(choices)
        comparison = self._compare()
        if self._options.sensitivity:
            self._measure_layers(choices)
        report = self._report(comparison)
        write_report(report, self._bundle.path / DIRECTORY)
        self._drop_stand_in()
        return report

    def manifest(self) -> Any:
        """The manifest with the new graphs."""
        known = self._bundle.manifest
        return known.model_copy(update={"graphs": (*known.graphs, *self._graphs)})

    def _statistics(self) -> Mapping[str, InputStatistics]:
        """Gathered now, or by an earlier run where the scheme can do with those, or none."""
        path = self._bundle.path / STATISTICS
        if not self._scheme.needs_statistics and self._options.kv_cache is None:
            return load_statistics(path) if path.is_file() else {}
        seen = observe(
            self._bundle,
            self._reference,
            self._prompts,
            self._tour,
            self._window,
            self._options.seed,
            self._progress,
            self._options.threads,
        )
        save_statistics(path, seen)
        return seen

    def _scale_cache(self, statistics: Mapping[str, InputStatistics]) -> None:
        """Find the scales of K/V rows, where they are to be rounded."""
        kv_cache, manifest = self._options.kv_cache, self._bundle.manifest
        if kv_cache is not None:
            self._row_scales = row_scales(statistics, manifest)
            self._kv_cache = describe_cache(self._row_scales, statistics, manifest, kv_cache)

    def _drop_stand_in(self) -> None:
        """The prefix graph only stood for those with a quantised cache, which it cannot have itself."""
        if self._options.kv_cache is not None:
            for name in _names(self._reference.file, self._options.name):
                self._bundle.file(name).unlink()
            self._graphs = [graph for graph in self._graphs if graph.form is not Form.PREFIX]

    def _choose(self, statistics: Mapping[str, InputStatistics]) -> dict[str, Choice]:
        """What becomes of each projection; those below the floor are left out."""
        path = self._bundle.file(self._reference.file)
        model = load_graph(path)
        stored, found = StoredWeights(model, path.parent), projections(model)
        floor = self._scheme.floor if self._options.floor is None else self._options.floor
        chosen = {}
        for projection in self._progress.each(found, "searching"):
            choice = search(
                projection,
                stored[projection.name],
                statistics.get(projection.name),
                self._scheme,
                find_range(self._options.range),
                grouped=self._scheme.activation is None,
            )
            quantised = choice.signal_to_noise >= floor
            if quantised:
                chosen[projection.name] = choice
            self._layers.append(_layer(projection, choice, quantised))
        return chosen

    def _write_graphs(self, choices: Mapping[str, Choice]) -> None:
        rewritten: dict[str, str] = {}
        for graph in self._bundle.manifest.graphs:
            if graph.file not in rewritten:
                name = self._write_graph(graph, choices)
                if name is None:
                    continue
                rewritten[graph.file] = name
            changes = {"file": rewritten[graph.file], "precision": self._options.name}
            if graph.form is Form.PORTABLE and self._options.kv_cache:
                changes["cache_dtype"] = self._options.kv_cache
            self._graphs.append(graph.model_copy(update=changes))

    def _write_graph(self, graph: StepGraph, choices: Mapping[str, Choice]) -> str | None:
        """Quantise one file; returns its name, or None where its form cannot have the scheme."""
        if graph.precision not in ("fp32", "fp16") or not check_form(graph.form, self._scheme):
            return None
        if self._row_scales and graph.form is Form.MODERN:
            return None
        names = _names(graph.file, self._options.name)
        count = len(projections(load_graph(self._bundle.file(graph.file))))
        with self._progress.count(f"writing {names[0]}", count) as advance:
            self._rewrite(graph, choices, names, advance, self._row_scales)
        return names[0]

    def _rewrite(
        self,
        graph: StepGraph,
        choices: Mapping[str, Choice],
        names: tuple[str, str],
        advance: Callable[[int], None] = lambda _: None,
        row_scales: Mapping[str, Float] | None = None,
    ) -> None:
        """Write a graph with some products and maybe the cache quantised; ``names``: see ``_names``."""
        directory = self._bundle.path
        model = load_graph(directory / graph.file)
        stored = StoredWeights(model, directory)
        with WeightsFile(directory / names[1]) as file:
            Rewriter(model, stored, graph.form, self._scheme, choices, file).run(advance)
        if row_scales:
            quantise_cache(model, graph.form, row_scales)
        (directory / names[0]).write_bytes(model.SerializeToString())

    def _pair(
        self, reference: PrefixEngine, candidate: StepGraph, comparison: Comparison
    ) -> tuple[PairedEngine, Tour]:
        """FP32 and a candidate side by side, and what guides them along trajectories."""
        manifest = self._bundle.manifest
        ranges = manifest.sampling.range_table(manifest.layout.stream())
        pair = PairedEngine(reference, self._engine(candidate), ranges, comparison)
        return pair, Tour(self._bundle, pair, self._window, self._prompts, self._options.seed + GATE_SEED)

    def _measure_layers(self, choices: Mapping[str, Choice]) -> None:
        """Quantise one layer at a time and note the divergence of the predictions."""
        names = ("single.onnx", "single.bin")
        graph = self._reference.model_copy(update={"file": names[0]})
        reference = self._engine(self._reference)
        parts = list(dict.fromkeys(_part(layer["name"]) for layer in self._layers))
        try:
            for part in self._progress.each(parts, "sensitivity"):
                alone = {name: choice for name, choice in choices.items() if _part(name) == part}
                self._rewrite(self._reference, alone, names)
                comparison = Comparison()
                pair, guide = self._pair(reference, graph, comparison)
                pair.remaining = SENSITIVITY_STEPS
                guide.run(self._tour[0], 0)
                for layer in self._layers:
                    if _part(layer["name"]) == part:
                        layer["divergence"] = comparison.figures()["divergence"]
        finally:
            for name in names:
                (self._bundle.path / name).unlink(missing_ok=True)

    def _compare(self) -> Comparison:
        """Decode every trajectory with both engines."""
        comparison, manifest = Comparison(), self._bundle.manifest
        candidate = next(graph for graph in self._graphs if graph.form is Form.PREFIX)
        pair, guide = self._pair(self._engine(self._reference), candidate, comparison)
        pixels = None
        if manifest.tokenizer is not None:
            pixels = PixelCodec(self._bundle, CpuOptions(self._options.threads, prepack=False))

        def on_frame(places: Int) -> None:
            if pixels is not None:
                comparison.frame_errors.append(_frame_error(pixels, pair, places, manifest.layout.rows))

        with self._progress.count("gate", len(self._tour)) as advance:
            for number, trajectory in enumerate(self._tour):
                pair.remaining = trajectory.steps
                guide.run(trajectory, number, on_frame)
                advance(1)
        return comparison

    def _engine(self, graph: StepGraph) -> PrefixEngine:
        only = self._bundle.manifest.model_copy(update={"graphs": (graph,)})
        options = CpuOptions(self._options.threads, prepack=False, fuse=self._scheme.weight != "fp8")
        return PrefixEngine(
            Bundle(self._bundle.path, only), *capacity(self._bundle.manifest, self._window), options
        )

    def _report(self, comparison: Comparison) -> Report:
        figures = comparison.figures()
        path, candidate = self._bundle.path, next(g for g in self._graphs if g.form is Form.PREFIX)
        return Report(
            model=self._bundle.manifest.name,
            precision=self._options.name,
            range=self._options.range if self._scheme.activation == "static" else None,
            seed=self._options.seed,
            trajectories=[_describe(trajectory) for trajectory in self._tour],
            figures=figures,
            budget=self._options.budget,
            failures=failures(figures, self._options.budget),
            bytes_before=_read_bytes(path, self._reference.file),
            bytes_after=_read_bytes(path, candidate.file),
            milliseconds={name: 1e3 * float(np.median(s)) for name, s in comparison.seconds.items()},
            agreement_by_width={
                width: agreed / rows for width, (agreed, rows) in sorted(comparison.by_width.items())
            },
            layers=self._layers,
            kv_cache=self._kv_cache,
        )


def _names(file: str, precision: str) -> tuple[str, str]:
    """Files of a quantised graph and of its weights, for the file of the graph in floating point."""
    stem = file.removesuffix(".onnx").removeprefix("step")
    return f"step{stem}.{precision}.onnx", f"weights{stem}.{precision}.bin"


def _part(name: str) -> str:
    """The layer that a projection belongs to: ``transformer.layers.3``; the head is ``transformer.head``."""
    return ".".join(name.split(".")[:3])


def _layer(projection: Projection, choice: Choice, quantised: bool) -> dict[str, Any]:
    return {
        "name": projection.name,
        "inputs": projection.inputs,
        "outputs": projection.outputs,
        "signal_to_noise": choice.signal_to_noise,
        "alpha": choice.alpha,
        "range": choice.limit,
        "quantised": quantised,
    }


def _describe(trajectory: Trajectory) -> dict[str, Any]:
    schedule = trajectory.schedule
    return {"name": trajectory.name, "k": schedule.k, "d": schedule.d, "steps": trajectory.steps}


def _frame_error(pixels: PixelCodec, pair: PairedEngine, places: Int, rows: int) -> float:
    """Mean squared error between the frames of the most probable tokens of both engines."""
    shown = [next(iter(pixels.decode([best[places].reshape(rows, -1)]))) for best in pair.best]
    return float(np.square(shown[0].astype(np.float64) - shown[1]).mean())


def _read_bytes(path: Any, file: str) -> int:
    """Bytes of the initializers that a step of the graph reads."""
    from math import prod

    from onnx import helper

    bits = {"INT4": 4}
    total = 0
    for tensor in load_graph(path / file).graph.initializer:
        kind = helper.tensor_dtype_to_string(tensor.data_type).rsplit(".", maxsplit=1)[-1]
        size = bits.get(kind, 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        total += prod(tensor.dims) * size // 8
    return total
