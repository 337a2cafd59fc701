"""A graph whose layers are copies of one that was traced is the graph of which every layer was traced."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from diagd.bundle import Form
from diagd.bundle.transformer import NormKind, TextShape
from diagd.calibration.matrices import RowScaledMatrix
from diagd.export import step_graph
from diagd.export.layers import models
from diagd.export.step_graph import StepVariant, projections, trace_step
from diagd.export.weights import WeightSource
from diagd.schedule import StreamLayout
from tests.oracles.models import small_model

PLAIN = small_model(StreamLayout(2, 3), layers=4, context_frames=2).config
CONFIGS = {
    "gated": PLAIN,
    "gelu": replace(PLAIN, gated=False, bias=True, norm=NormKind.LAYER, tied_head=True, rotary=None),
    "text": replace(PLAIN, text=TextShape(4, 8)),
}


class Matrix(RowScaledMatrix):
    """Of rounded weights that nobody reads."""

    def __init__(self, inputs: int, outputs: int) -> None:
        shapes: dict[str, tuple[int, ...]] = {"q": (inputs, outputs), "scale": (outputs,)}
        types: dict[str, np.dtype[Any]] = {"q": np.dtype(np.int8), "scale": np.dtype(np.float32)}
        sources = {n: WeightSource(shape, lambda: iter(()), types[n]) for n, shape in shapes.items()}
        super().__init__(outputs, sources)


def rounded(*plain: str) -> StepVariant:
    """All products but some are rounded."""
    found = [p for p in projections(PLAIN) if not any(name in p.name for name in plain)]
    return StepVariant({p.name: Matrix(p.inputs, p.outputs) for p in found})


SOME = rounded("layers.1.", "layers.3.", "head")
CASES = {
    "gated": ("gated", Form.PREFIX, StepVariant()),
    "gelu": ("gelu", Form.PORTABLE, StepVariant()),
    "text": ("text", Form.MODERN, StepVariant()),
    "watched": ("gated", Form.PREFIX, StepVariant(watch=True)),
    "an int8 cache": ("gated", Form.PORTABLE, StepVariant(integer_cache=True, opset=21)),
    "some rounded": ("gated", Form.PREFIX, SOME),
}


def meaning(model: ir.Model) -> list[object]:
    """What tells graphs apart: how each output comes of inputs and weights, whatever values are called."""
    named = {id(value): value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}

    @cache
    def of(value: ir.Value | None) -> object:
        if value is None or (node := value.producer()) is None:
            data = None if value is None else value.const_value
            if data is not None and data.size < 9 and not str(value and value.name).startswith("transformer"):
                return ("literal", str(data.dtype), str(data.numpy().tolist()))
            return named.get(id(value)), str(value and value.dtype)
        if node.op_type == "Identity":
            return of(node.inputs[0])
        attributes = sorted(
            (name, str(entry.value.numpy() if entry.type == ir.AttributeType.TENSOR else entry.value))
            for name, entry in node.attributes.items()
        )
        inputs = [of(value) for value in node.inputs]
        return hash((node.op_identifier(), str(attributes), node.outputs.index(value), str(inputs)))

    for node in model.graph:  # none is far from those that are known
        for value in node.outputs:
            of(value)
    shapes = [(v.name, re.sub(r"s\d+", "s", str(v.shape)), str(v.dtype)) for v in model.graph.outputs]
    operators = sorted(node.op_type for node in model.graph if node.op_type != "Identity")
    held = [(name, v.const_value) for name, v in model.graph.initializers.items()]
    weights = sorted(name if data is None else f"{data.dtype} {data.numpy().tolist()}" for name, data in held)
    inputs = [value.name for value in model.graph.inputs]
    return [shapes, [of(v) for v in model.graph.outputs], operators, weights, inputs, model.opset_imports]


@pytest.mark.parametrize(("config", "form", "variant"), CASES.values(), ids=CASES)
def test_copies_are_what_would_be_traced(
    config: str, form: Form, variant: StepVariant, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = trace_step(CONFIGS[config], form, capacity=64, variant=variant)
    assert len(set(models(PLAIN.layers, variant.matrices))) < PLAIN.layers
    monkeypatch.setattr(step_graph, "models", lambda layers, _: list(range(layers)))
    whole = trace_step(CONFIGS[config], form, capacity=64, variant=variant)
    for ours, theirs in zip(meaning(copied), meaning(whole), strict=True):
        assert ours == theirs


def test_only_equal_layers_are_copies() -> None:
    assert models(4, {}) == [0, 1, 1, 1]
    assert models(1, {}) == [0]
    assert models(4, SOME.matrices) == [0, 1, 2, 1]
    assert models(4, rounded("layers.2.", "layers.3.attention").matrices) == [0, 1, 2, 3]
