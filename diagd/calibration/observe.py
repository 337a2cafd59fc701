"""Statistics of a bundle's activations, gathered by its own graph along real schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import StepGraph
from diagd.calibration.kv_cache import cache_rows
from diagd.calibration.projections import load_graph, projections
from diagd.calibration.statistics import InputStatistics, StatisticsCollector
from diagd.calibration.trajectory import (
    EnoughStepsError,
    Prompts,
    Tour,
    Trajectory,
    capacity,
)
from diagd.engines.engine import Float, SamplingState, StepInputs
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import PrefixEngine
from diagd.progress import Progress

if TYPE_CHECKING:
    import onnx

GRAPH_NAME = "observed.onnx"


class ObservedEngine(PrefixEngine):
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
        report: Callable[[Mapping[str, Float]], None],
    ) -> None:
        super().__init__(bundle, *sizes, options)
        self._names, self._values, self._report = list(outputs), list(outputs.values()), report
        self.remaining = 0

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """See ``Engine.step``; raises ``EnoughStepsError`` once ``remaining`` steps have run."""
        if not self.remaining:
            raise EnoughStepsError
        self.remaining -= 1
        for value in self._values:  # their size follows the step's: the memory is ONNX Runtime's
            self._binding.bind_output(value, "cpu")
        logits = super().step(inputs, sampling)
        values = self.outputs[1 : 1 + len(self._names)]
        self._report({name: value.numpy() for name, value in zip(self._names, values, strict=True)})
        return logits


def observe(
    bundle: Bundle,
    graph: StepGraph,
    prompts: Prompts,
    tour: Sequence[Trajectory],
    window: int,
    seed: int,
    progress: Progress,
    threads: int = 0,
) -> dict[str, InputStatistics]:
    """Decode every trajectory with the bundle's FP32 graph; watch the inputs of products and the K/V rows.

    Args:
        bundle: writable copy; a graph is added beside its files and removed again.
        graph: the FP32 prefix graph.
        prompts: where prompts and actions come from.
        tour: trajectories.
        window: frames of the session.
        seed: of prompts, actions, sampling and the kept rows.
        progress: where to report.
        threads: of ONNX Runtime.

    Raises:
        QualityError: an activation is not finite.
    """
    model = load_graph(bundle.file(graph.file))
    found = projections(model)
    cache, rows = bundle.manifest.cache, cache_rows(model)
    sizes = {projection.name: projection.inputs for projection in found}
    sizes |= dict.fromkeys(rows, cache.kv_heads * cache.head_size)
    outputs = {projection.name: projection.activation for projection in found} | rows
    collector = StatisticsCollector(sizes, seed)
    path = bundle.file(GRAPH_NAME)
    _save_observed(model, outputs.values(), path)
    manifest = bundle.manifest.model_copy(
        update={"graphs": (StepGraph(file=GRAPH_NAME, form=Form.PREFIX, precision="fp32"),)}
    )
    watched = Bundle(bundle.path, manifest)
    options = CpuOptions(threads, prepack=False)
    try:
        engine = ObservedEngine(watched, capacity(manifest, window), options, outputs, collector.add)
        guide = Tour(watched, engine, window, prompts, seed)
        with progress.count("calibration", len(tour)) as advance:
            for number, trajectory in enumerate(tour):
                engine.remaining = trajectory.steps
                guide.run(trajectory, number)
                advance(1)
    finally:
        path.unlink(missing_ok=True)
    return collector.inputs


def _save_observed(model: onnx.ModelProto, values: Iterable[str], path: Path) -> None:
    from onnx import TensorProto, helper

    for value in values:
        model.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
    path.write_bytes(model.SerializeToString())
