"""The quantised files of a bundle, for every form that can have the scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import StepGraph
from diagd.calibration.kv_rewrite import quantise_cache
from diagd.calibration.nodes import check_form
from diagd.calibration.projections import StoredWeights, load_graph, projections
from diagd.calibration.reference import FLOATING
from diagd.calibration.rewrite import Rewriter
from diagd.calibration.schemes import Scheme
from diagd.calibration.search import Choice
from diagd.calibration.weights_file import WeightsFile
from diagd.engines.engine import Float
from diagd.export.onnx_file import read_onnx
from diagd.progress import Progress

SINGLE = ("single.onnx", "single.bin")
"""Files of a graph of which one layer is quantised."""


@dataclass(frozen=True)
class Target:
    """What graphs become.

    Attributes:
        scheme: of their products.
        name: precision of the graphs.
        half: GPU forms compute in float16 what stays in floating point.
        kv_cache: element type of the K/V buffers of portable graphs; None: floating point.
        row_scales: of K/V rows, where they are rounded.
    """

    scheme: Scheme
    name: str
    half: bool
    kv_cache: str | None = None
    row_scales: Mapping[str, Float] = field(default_factory=dict)

    def refusal(self, form: Form) -> str | None:
        """Why graphs of a form cannot have it; None where they can."""
        if not check_form(form, self.scheme):
            return (
                f"TensorRT has no product whose activations are scaled row by row, as {self.scheme.name} is"
            )
        if self.kv_cache and form is Form.MODERN:
            return f"TensorScatter takes floating point only, the cache is {self.kv_cache}"
        if self.kv_cache and form is Form.PREFIX:
            return f"attention reads the buffers as they lie, the cache is {self.kv_cache}"
        return None


class GraphWriter:
    """Writes graphs beside those they come from.

    Args:
        bundle: writable copy.
        target: what they become.
        progress: where to report.
    """

    def __init__(self, bundle: Bundle, target: Target, progress: Progress) -> None:
        self._bundle, self._target, self._progress = bundle, target, progress

    def write(self, graphs: Sequence[StepGraph], choices: Mapping[str, Choice]) -> tuple[StepGraph, ...]:
        """Quantise one file and say what its graphs are now."""
        names = file_names(graphs[0].file, self._target.name)
        count = len(projections(load_graph(self._bundle.file(graphs[0].file))))
        with self._progress.count(f"writing {names[0]}", count) as advance:
            self._rewrite(graphs[0], choices, names, advance)
        return tuple(self._described(graph, names[0]) for graph in graphs)

    def write_part(self, graphs: Sequence[StepGraph], choices: Mapping[str, Choice]) -> tuple[StepGraph, ...]:
        """The same into files of passing use, see ``remove_part``."""
        self._rewrite(graphs[0], choices, SINGLE)
        return tuple(self._described(graph, SINGLE[0]) for graph in graphs)

    def remove_part(self) -> None:
        """Delete what ``write_part`` wrote."""
        for name in SINGLE:
            self._bundle.file(name).unlink(missing_ok=True)

    def write_others(
        self, written: Sequence[StepGraph], choices: Mapping[str, Choice]
    ) -> tuple[StepGraph, ...]:
        """Every file in floating point but those of a form that is written; returns all quantised graphs."""
        found, done = list(written), {graph.form for graph in written}
        for form in (Form.PREFIX, Form.MODERN, Form.PORTABLE):
            graphs = [g for g in self._bundle.manifest.graphs if g.form is form and g.precision in FLOATING]
            if graphs and form not in done and self._target.refusal(form) is None:
                found += self.write(graphs, choices)
        return tuple(found)

    def _described(self, graph: StepGraph, file: str) -> StepGraph:
        weights = read_onnx(self._bundle.file(file)).weights
        changes: dict[str, object] = {"file": file, "precision": self._target.name, "weights": weights}
        if self._is_halved(graph):
            changes["cache_dtype"] = "float16"
        if graph.form is Form.PORTABLE and self._target.kv_cache:
            changes["cache_dtype"] = self._target.kv_cache
        return graph.model_copy(update=changes)

    def _is_halved(self, graph: StepGraph) -> bool:
        return self._target.half and graph.form is not Form.PREFIX and graph.precision == "fp32"

    def _rewrite(
        self,
        graph: StepGraph,
        choices: Mapping[str, Choice],
        names: tuple[str, str],
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        directory, target = self._bundle.path, self._target
        model = load_graph(directory / graph.file)
        stored = StoredWeights(model, directory)
        with WeightsFile(directory / names[1]) as file:
            halves = self._is_halved(graph)
            Rewriter(model, stored, graph.form, target.scheme, choices, file, half=halves).run(advance)
        if target.row_scales:
            quantise_cache(model, graph.form, target.row_scales)
        (directory / names[0]).write_bytes(model.SerializeToString())


def file_names(file: str, precision: str) -> tuple[str, str]:
    """Files of a quantised graph and of its weights, for the file of the graph in floating point."""
    stem = file.removesuffix(".onnx").removeprefix("step")
    return f"step{stem}.{precision}.onnx", f"weights{stem}.{precision}.bin"


def read_bytes(graph: Path) -> int:
    """Bytes of the initializers that a step of the graph reads."""
    from onnx import helper

    bits = {"INT4": 4}
    total = 0
    for tensor in load_graph(graph).graph.initializer:
        kind = helper.tensor_dtype_to_string(tensor.data_type).rsplit(".", maxsplit=1)[-1]
        size = bits.get(kind, 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        total += prod(tensor.dims) * size // 8
    return total
