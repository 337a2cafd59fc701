"""Statistics of a bundle's activations, gathered by its own graph along real schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import StepGraph
from diagd.calibration.statistics import InputStatistics, StatisticsCollector
from diagd.calibration.stored import StoredWeights
from diagd.calibration.trajectory import (
    EnoughStepsError,
    Prompts,
    Tour,
    Trajectory,
    capacity,
)
from diagd.engines.engine import Float, SamplingState, StepInputs
from diagd.engines.fixed import Array, FixedEngine, FixedStep, cache_tensors
from diagd.engines.modern import ModernStep
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.portable import PortableStep
from diagd.engines.prefix import PrefixEngine
from diagd.export.exporter import TORCH_TYPES
from diagd.export.step_graph import PLAIN, WATCHED, StepVariant, trace_step, watched_values
from diagd.export.tracing import link_weights, save
from diagd.progress import Progress
from diagd.runtime.session import token_places

GRAPH_NAME = "observed.onnx"
Report = Callable[[Mapping[str, Float]], None]


class ObservedPrefix(PrefixEngine):
    """A prefix engine that hands out inputs of products after every step.

    Args:
        bundle: whose only graph has the further outputs.
        outputs: name of each output, by what it is reported as.
        report: told about every step, float32 [rows, K] by name.
    """

    def __init__(
        self,
        bundle: Bundle,
        sizes: tuple[int, int],
        options: CpuOptions,
        outputs: Mapping[str, str],
        report: Report,
    ) -> None:
        super().__init__(bundle, *sizes, options)
        self._names, self._values, self._report = list(outputs), list(outputs.values()), report
        self._first = len(self.outputs)  # outputs come in the order in which they were first bound
        self._bind_watched()
        self.remaining = 0

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """See ``Engine.step``; raises ``EnoughStepsError`` once ``remaining`` steps have run."""
        if not self.remaining:
            raise EnoughStepsError
        self.remaining -= 1
        self._bind_watched()
        logits = super().step(inputs, sampling)
        values = self.outputs[self._first : self._first + len(self._names)]
        self._report({name: value.numpy() for name, value in zip(self._names, values, strict=True)})
        return logits

    def _bind_watched(self) -> None:
        """Their size follows the step's: the memory is ONNX Runtime's."""
        for value in self._values:
            self._binding.bind_output(value, "cpu")


class _ObservedStep(FixedStep):
    """A width whose watched values have memory of their own."""

    def outputs(self) -> dict[str, Array]:
        """See ``FixedStep.outputs``."""
        assert isinstance(self.engine, _ObservedFixed)
        self.watched = {
            name: np.zeros((len(self.uniforms), size), self.engine.dtype)
            for name, (_, size) in self.engine.watched.items()
        }
        values = {value: self.watched[name] for name, (value, _) in self.engine.watched.items()}
        return {**super().outputs(), **values}  # type: ignore[safe-super]

    def run(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """See ``FixedStep.run``; pad rows are not reported."""
        assert isinstance(self.engine, _ObservedFixed)
        logits, rows = super().run(inputs, sampling), len(inputs.positions)
        seen = {**self.watched, **self.cache_rows()}
        self.engine.report({name: array[:rows].astype(np.float32) for name, array in seen.items()})
        return logits

    def cache_rows(self) -> dict[str, Array]:
        """K/V rows [W, G, D] of the step, where the graph gives them back."""
        return {}


class _ObservedModernStep(_ObservedStep, ModernStep):
    pass


class _ObservedPortableStep(_ObservedStep, PortableStep):
    def cache_rows(self) -> dict[str, Array]:
        """See ``_ObservedStep.cache_rows``."""
        return {name: rows[0].swapaxes(0, 1) for name, rows in self.new_rows.items()}


class _ObservedFixed(FixedEngine):
    """An engine of fixed capacity that hands out inputs of products after every step.

    Args:
        bundle: whose only graphs have the further outputs.
        tokens: size of the token buffer.
        watched: name and channels of each output, by what it is reported as.
        report: told about every step, float32 [rows, K] by name.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokens: int,
        options: CpuOptions,
        watched: Mapping[str, tuple[str, int]],
        report: Report,
    ) -> None:
        self.watched, self.report, self.remaining = watched, report, 0
        self.dtype = np.dtype(np.float16 if bundle.manifest.graphs[0].precision == "fp16" else np.float32)
        super().__init__(bundle, tokens, options)

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """See ``Engine.step``; raises ``EnoughStepsError`` once ``remaining`` steps have run."""
        if not self.remaining:
            raise EnoughStepsError
        self.remaining -= 1
        return super().step(inputs, sampling)


class ObservedModern(_ObservedFixed):
    """The ``modern`` form; see ``_ObservedFixed``."""

    form = Form.MODERN
    step_type = _ObservedModernStep


class ObservedPortable(_ObservedFixed):
    """The ``portable`` form; see ``_ObservedFixed``."""

    form = Form.PORTABLE
    step_type = _ObservedPortableStep


def observe(
    bundle: Bundle,
    graphs: Sequence[StepGraph],
    prompts: Prompts,
    tour: Sequence[Trajectory],
    window: int,
    seed: int,
    progress: Progress,
    threads: int = 0,
) -> dict[str, InputStatistics]:
    """Decode every trajectory with a bundle's graph; watch the inputs of products and the K/V rows.

    Args:
        bundle: writable copy; a graph is added beside its files and removed again.
        graphs: of one form in floating point.
        prompts: where prompts and actions come from.
        tour: trajectories.
        window: frames of the session.
        seed: of prompts, actions, sampling and the kept rows.
        progress: where to report.
        threads: of ONNX Runtime.

    Raises:
        QualityError: an activation is not finite.
    """
    cache, form = bundle.manifest.cache, graphs[0].form
    watched_sizes = watched_values(bundle.manifest.transformer, form)
    outputs = {name: f"{WATCHED}{name}" for name in watched_sizes}
    cached = cache_tensors(cache) if form is Form.PORTABLE else []
    sizes = watched_sizes | dict.fromkeys(cached, cache.kv_heads * cache.head_size)
    collector = StatisticsCollector(sizes, seed)
    path = bundle.file(GRAPH_NAME)
    _save_watched(bundle, graphs[0], path)
    manifest = bundle.manifest.model_copy(
        update={"graphs": tuple(graph.model_copy(update={"file": GRAPH_NAME}) for graph in graphs)}
    )
    watched = Bundle(bundle.path, manifest)
    options = CpuOptions(threads, prepack=False)
    try:
        engine: ObservedPrefix | ObservedModern | ObservedPortable
        if graphs[0].form is Form.PREFIX:
            engine = ObservedPrefix(watched, capacity(manifest, window), options, outputs, collector.add)
        else:
            values = {name: (value, sizes[name]) for name, value in outputs.items()}
            tokens = token_places(manifest.layout, window).size
            fixed = ObservedModern if graphs[0].form is Form.MODERN else ObservedPortable
            engine = fixed(watched, tokens, options, values, collector.add)
        guide = Tour(watched, engine, window, prompts, seed)
        with progress.count("calibration", len(tour)) as advance:
            for number, trajectory in enumerate(tour):
                engine.remaining = trajectory.steps
                guide.run(trajectory, number)
                advance(1)
    finally:
        path.unlink(missing_ok=True)
    return collector.inputs


def _save_watched(bundle: Bundle, graph: StepGraph, path: Path) -> None:
    model = trace_step(
        bundle.manifest.transformer,
        graph.form,
        bundle.manifest.sampling,
        dtype=TORCH_TYPES[graph.precision],
        capacity=graph.capacity or 0,
        variant=StepVariant(watch=True),
    )
    tensors = StoredWeights(bundle).tensors()
    save(link_weights(model, tensors | {name + PLAIN: tensors[name] for name in tensors}), path)
