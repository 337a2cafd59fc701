"""The quantised files of a bundle, for every form that can have the scheme: traced with other matrices."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import StepGraph
from diagd.bundle.precision import FLOATING, PRECISIONS
from diagd.calibration.evaluate import part_of
from diagd.calibration.matrices import (
    BLOCKED_OPSET,
    QUANTISED_OPSET,
    EitherMatrix,
    QuantisedMatrix,
    Weight,
    quantised_matrix,
)
from diagd.calibration.options import CalibrationOptions
from diagd.calibration.search import Choice
from diagd.engines.engine import Float
from diagd.export.exporter import TORCH_TYPES
from diagd.export.onnx_file import read_onnx
from diagd.export.step_graph import PLAIN, StepVariant, projections, trace_step
from diagd.export.tracing import save
from diagd.export.weights import StoredWeights, WeightSource, constant, store
from diagd.progress import Progress

if TYPE_CHECKING:
    import onnx_ir as ir

SINGLE = ("single.onnx", "single.bin", "rounded.bin")
"""Files of a graph of which one layer is quantised, and of the rounded weights of all of them."""

Choices = Mapping[str, Choice]


class GraphWriter:
    """Writes graphs beside those they come from, in a bundle that is a writable copy.

    ``row_scales`` are of K/V rows, none where those are not rounded.
    """

    def __init__(
        self, bundle: Bundle, options: CalibrationOptions, row_scales: Mapping[str, Float], progress: Progress
    ) -> None:
        self._bundle, self._options, self._row_scales = bundle, options, row_scales
        self._scheme, self._progress = options.scheme, progress
        self._config, self._stored = bundle.manifest.transformer, StoredWeights(bundle)

    def write(self, graphs: Sequence[StepGraph], choices: Choices) -> tuple[StepGraph, ...]:
        """Quantise one file and say what its graphs are now."""
        name, weights = file_names(graphs[0].file, self._options.name)
        matrices = self._matrices(graphs[0], choices)
        model = self._trace(graphs[0], matrices)
        sources = self._rounded(graphs[0], matrices) | self._floats(model, graphs[0], choices)
        with self._progress.bytes(f"writing {name}", sum(s.bytes for s in sources.values())) as advance:
            tensors = self._stored.tensors() | store(self._bundle.file(weights), sources, advance)
            save(_without_shapes(model), tensors, self._bundle.file(name))
        return tuple(self._described(graph, name) for graph in graphs)

    def parts(
        self, graphs: Sequence[StepGraph], choices: Choices
    ) -> Generator[tuple[str, tuple[StepGraph, ...]]]:
        """Graphs of which one layer alone is quantised, one after the other, by the layer's name.

        One trace and one file of rounded weights serve them all; a graph lasts until the next is asked for.
        """
        rounded = self._matrices(graphs[0], choices)
        inputs = {projection.name: projection.inputs for projection in projections(self._config)}
        dtype = TORCH_TYPES[self._precision(graphs[0])]
        either = {name: EitherMatrix(matrix, inputs[name], dtype) for name, matrix in rounded.items()}
        traced = _without_shapes(self._trace(graphs[0], either))
        sources = {f"{name}.rounded": matrix for name, matrix in rounded.items()}
        rounded_file = self._bundle.file(SINGLE[2])
        tensors = self._stored.tensors() | store(rounded_file, self._rounded(graphs[0], sources))
        try:
            for part in dict.fromkeys(map(part_of, choices)):
                chosen = {name: choice for name, choice in choices.items() if part_of(name) == part}
                self._bundle.file(SINGLE[1]).unlink(missing_ok=True)  # there may be no floats
                floats = self._part_floats(traced, graphs[0], choices, chosen)
                linked = tensors | store(self._bundle.file(SINGLE[1]), floats)
                save(traced, linked, self._bundle.file(SINGLE[0]))
                yield part, tuple(self._described(graph, SINGLE[0]) for graph in graphs)
        finally:
            for name in SINGLE:
                self._bundle.file(name).unlink(missing_ok=True)

    def write_others(self, written: Sequence[StepGraph], choices: Choices) -> tuple[StepGraph, ...]:
        """Every file in floating point but those of a form that is written; returns all quantised graphs."""
        found, done = list(written), {graph.form for graph in written}
        for form in Form:
            graphs = [g for g in self._bundle.manifest.graphs if g.form is form and g.precision in FLOATING]
            if graphs and form not in done and self._options.refusal(form) is None:
                found += self.write(graphs, choices)
        return tuple(found)

    def _described(self, graph: StepGraph, file: str) -> StepGraph:
        weights = read_onnx(self._bundle.file(file)).weights
        changes: dict[str, object] = {"file": file, "precision": self._options.name, "weights": weights}
        if self._precision(graph) != graph.precision:
            changes["cache_dtype"] = "float16"
        if self._options.kv_cache and graph.form.traits.float_cache is None:
            changes["cache_dtype"] = self._options.kv_cache
        return graph.model_copy(update=changes)

    def _matrices(self, graph: StepGraph, choices: Choices) -> dict[str, QuantisedMatrix]:
        divisors, dtype = self._divisors(choices), self._dtype(graph)
        return {
            name: quantised_matrix(
                Weight(self._stored, name, dtype, choice.factors, divisors.get(name)),
                choice.limit,
                self._scheme,
                graph.form,
            )
            for name, choice in choices.items()
        }

    def _trace(self, graph: StepGraph, matrices: Mapping[str, nn.Module]) -> ir.Model:
        # from opset 18 on operators only gained types and attributes
        blocked = self._row_scales or (self._scheme.kind == "int4" and not graph.form.traits.host)
        opset = BLOCKED_OPSET if blocked else QUANTISED_OPSET
        return trace_step(
            self._config,
            graph.form,
            dtype=TORCH_TYPES[self._precision(graph)],
            capacity=graph.capacity or 0,
            streams=graph.streams,
            variant=StepVariant(matrices, bool(self._row_scales), opset=opset),
        )

    def _precision(self, graph: StepGraph) -> str:
        """What is computed in beside the quantised products of a graph."""
        half = self._options.floats == "fp16" and not graph.form.traits.host
        return "fp16" if half else graph.precision

    def _dtype(self, graph: StepGraph) -> np.dtype[np.generic]:
        return np.dtype(PRECISIONS[self._precision(graph)].kind)

    def _rounded(self, graph: StepGraph, matrices: Mapping[str, QuantisedMatrix]) -> dict[str, WeightSource]:
        """Buffers of the modules, and of rows that are rounded (``StepVariant``), by name in the graph."""
        found, dtype = dict[str, WeightSource](), self._dtype(graph)
        for name, scale in self._row_scales.items():
            found[f"kv.{name}"] = constant(
                (scale[:, None] if graph.form.traits.fixed else scale).astype(dtype)
            )
        if found:
            found |= {"kv.unit": constant(np.ones((), dtype)), "kv.zero": constant(np.zeros((), np.int8))}
        for name, matrix in matrices.items():
            found |= {f"{name}.{key}": source for key, source in matrix.sources.items()}
        return found

    def _part_floats(
        self, model: ir.Model, graph: StepGraph, choices: Choices, chosen: Choices
    ) -> dict[str, WeightSource]:
        """What differs between graphs of which some products are quantised: switches and divided tensors."""
        found = self._floats(model, graph, chosen)
        for name in choices:
            switches = {"on": name in chosen, "off": name not in chosen}
            found |= {
                f"{name}.{key}": constant(np.asarray(value, self._dtype(graph)))
                for key, value in switches.items()
            }
        return found

    def _floats(self, model: ir.Model, graph: StepGraph, choices: Choices) -> dict[str, WeightSource]:
        """Initializers in floating point that are not read as they are stored."""
        divisors, dtype, found = self._divisors(choices), self._dtype(graph), dict[str, WeightSource]()
        for name in model.graph.initializers:
            tensor = name.removesuffix(PLAIN)
            if not tensor.startswith("transformer.") or tensor not in self._stored:
                continue
            if tensor in divisors or self._stored[tensor].dtype != dtype:
                found[name] = Weight(self._stored, tensor, dtype, columns=divisors.get(tensor)).source()
        return found

    def _divisors(self, choices: Choices) -> dict[str, Float]:
        """What the last axis of each tensor that absorbs factors is divided by."""
        divisors: dict[str, Float] = {}
        for projection in projections(self._config):
            choice, fold = choices.get(projection.name), projection.fold
            if choice is None or choice.factors is None or fold is None:
                continue
            for tensor in fold.tensors:
                width = self._stored[tensor].shape[-1]
                target = divisors.setdefault(tensor, np.ones(width, np.float32))
                target[fold.start : fold.start + projection.inputs] *= choice.factors
        return divisors


def _without_shapes(model: ir.Model) -> ir.Model:
    """A graph whose quantised products ONNX Runtime finds.

    Where it knows shapes, it makes a product and its residual one Gemm, which then hides the product from the
    fusion with DequantizeLinear.
    """
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    return model


def file_names(file: str, precision: str) -> tuple[str, str]:
    """Files of a quantised graph and of its weights, for the file of the graph in floating point."""
    stem = file.removesuffix(".onnx").removeprefix("step")
    return f"step{stem}.{precision}.onnx", f"weights{stem}.{precision}.bin"
