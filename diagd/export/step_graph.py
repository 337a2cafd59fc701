"""Traces the step of a transformer in a form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diagd.bundle.manifest import Form, FormTraits
from diagd.bundle.transformer import TransformerConfig
from diagd.engines.tensors import cache_tensors
from diagd.export.forms import Step, TextRows
from diagd.export.known_graphs import traced_once
from diagd.export.tracing import trace
from diagd.export.transformer import Transformer
from diagd.export.variants import IntegerRows, Watched, WatchedMatrix, WatchedRows, projections
from diagd.schedule import StreamLayout

if TYPE_CHECKING:
    import onnx_ir as ir

WATCHED = "watched."
"""Beginning of the names of outputs that show what is inside a step."""

PLAIN = ".plain"
"""Ending of a matrix's name where the module in its place has the matrix as well."""


@dataclass(frozen=True)
class StepVariant:
    """What sets a step graph apart from the plain one.

    Attributes:
        matrices: modules in the place of matrices, by name in the graph; their buffers are initializers
            ``NAME.BUFFER``.
        integer_cache: K/V rows are int8, with scales ``kv.key_0``, ``kv.value_0``, ..., [G, D] in prefix
            graphs and [G, 1, D] in portable ones, and the scalars ``kv.unit`` (1) and ``kv.zero``. Portable
            graphs take and give integers, prefix graphs round the rows they write.
        watch: inputs of products become outputs ``watched.NAME``, and in prefix graphs K/V rows [W, G, D]
            ``watched.key_0``, ...; matrices are then initializers ``NAME.plain``.
        opset: that the modules need at least.
    """

    matrices: Mapping[str, nn.Module] = field(default_factory=dict)
    integer_cache: bool = False
    watch: bool = False
    opset: int = 0


def trace_step(
    config: TransformerConfig,
    form: Form,
    *,
    dtype: torch.dtype = torch.float32,
    capacity: int = 0,
    streams: int = 1,
    variant: StepVariant = StepVariant(),
) -> ir.Model:
    """Trace one step graph on the meta device, its weights to be linked.

    Backends fix a dynamic width of the forms with a fixed capacity; all widths share one copy of the
    weights. ``capacity`` and ``streams`` count where they are fixed.
    """
    config, traits = _graph_config(config), form.traits
    step = Step(_transformer(config, dtype), form)
    watched = _vary(step, dtype, variant)
    inputs = _inputs(traits, capacity, streams)
    slots, live = inputs["slot_position"]
    sizes = (streams, config.kv_heads, capacity) if traits.fixed else (*slots.shape, config.kv_heads)
    stored = torch.int8 if variant.integer_cache and traits.float_cache is None else dtype
    past = [_empty(*sizes, config.head_size, dtype=stored) for _ in range(2 * config.layers)]
    text = _text_rows(config, dtype)
    named = [name for name, (tensor, _) in inputs.items() if tensor is not None]
    cache = cache_names(config.layers, "new" if traits.rows_out else "present")
    opset = max(traits.opset, variant.opset)
    settings = [repr(config), capacity, streams, variant.integer_cache, watched, opset]
    return traced_once(
        step,
        settings,
        lambda: trace(
            step,
            (*(tensor for tensor, _ in inputs.values()), past, text),
            input_names=[*named, *cache_names(config.layers, "past"), *text_names(config)],
            output_names=["logits", *cache, *watched],
            opset=opset,
            dynamic_shapes=(*(axes for _, axes in inputs.values()), [live] * len(past), [None] * len(text)),
            functions=step.functions,
        ),
    )


def _inputs(traits: FormTraits, capacity: int, streams: int) -> dict[str, tuple[Any, Any]]:
    """Examples and dynamic axes of a step's inputs but the cache, by name; None: the form has none."""
    rows, buffer, logits = 5, 17, 3  # pairwise different, so that no two axes are taken for one
    inputs: dict[str, tuple[Any, Any]] = {"token_buffer": (_empty(buffer), {0: "N"})}
    if traits.fixed:
        lead = (streams,) if streams > 1 else ()
        grid = {len(lead): "W"}
        inputs |= {name: (_empty(*lead, rows), grid) for name in ("sources", "positions")}
        inputs["slot_position"] = _empty(*lead, capacity), None
        return inputs | {
            "write_index": (_empty(streams, dtype=torch.int64), None),
            "logit_rows": (None, None),
        }
    grid = {0: "B", 1: "W"}
    inputs |= {name: (_empty(2, rows), grid) for name in ("sources", "positions")}
    inputs["slot_position"] = _empty(11, 2), {0: "T", 1: "B"}
    inputs["write_index"] = _empty(2, rows, dtype=torch.int64), grid
    return inputs | {"logit_rows": (_empty(logits), {0: "R"})}


def trace_text(config: TransformerConfig, dtype: torch.dtype = torch.float32) -> ir.Model:
    """Trace the graph from text float32 [length, width] to what step graphs read of it; ValueError: none.

    Its outputs are ``text_key_l`` and ``text_value_l`` [kv_heads, length, head_size], in ``dtype``.
    """
    config = _graph_config(config)
    if config.text is None:
        raise ValueError("the model reads no text")
    rows, text = TextRows(_transformer(config, dtype)), config.text
    return traced_once(
        rows,
        repr(config),
        lambda: trace(
            rows,
            (_empty(text.length, text.width, dtype=torch.float32),),
            input_names=["text"],
            output_names=text_names(config),
            opset=Form.PREFIX.traits.opset,
        ),
    )


def step_tensors(
    config: TransformerConfig, dtype: np.dtype[np.generic]
) -> dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]:
    """Shape and type of each tensor of the weights file of step graphs, by name, in its order."""
    transformer = _transformer(config, torch.float32)
    tensors = {**dict(transformer.named_parameters()), **dict(transformer.named_buffers())}
    return {f"transformer.{name}": (tuple(tensor.shape), dtype) for name, tensor in tensors.items()}


def watched_values(config: TransformerConfig, form: Form) -> dict[str, int]:
    """Channels of what a graph traced with ``watch`` gives out, by name, in the order of its outputs."""
    found = {projection.name: projection.inputs for projection in projections(config)}
    if form.traits.host:
        found |= dict.fromkeys(cache_tensors(config.layers), config.key_width)
    return found


def cache_names(layers: int, prefix: str) -> list[str]:
    """Names of the KV tensors of a graph; see `cache_tensors`."""
    return [f"{prefix}_{name}" for name in cache_tensors(layers)]


def text_names(config: TransformerConfig) -> list[str]:
    """Names of the text's keys and values, none for models without text."""
    return cache_names(config.layers, "text") if config.text else []


def _graph_config(config: TransformerConfig) -> TransformerConfig:
    """A model whose graphs are those of ``config`` but for the lengths of its tables, which weights tell.

    Only the learned vector of each place inside a frame has a graph know how long frames are.
    """
    if config.slot_embedding:
        return config
    return replace(config, layout=StreamLayout(2, 3), context_frames=4)


def _transformer(config: TransformerConfig, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        return Transformer(config).to("meta", dtype)


def _vary(step: Step, dtype: torch.dtype, variant: StepVariant) -> list[str]:
    """Change a step into a variant of it; returns the names of its further outputs."""
    config = step.transformer.config
    if variant.integer_cache:
        middle = (1,) if step.form.traits.fixed else ()
        step.kv = IntegerRows(config, (config.kv_heads, *middle, config.head_size), dtype)
    step.replace_matrices(variant.matrices)
    if not variant.watch:
        return []
    names = watched_values(config, step.form)
    step.watched = Watched(dict.fromkeys(names, torch.empty(0)))  # in the order of the outputs
    if step.form.traits.host:  # other forms give new rows out as they are
        step.kv = WatchedRows(step.watched)
    shapes = {p.name: (p.inputs, p.outputs) for p in projections(config)}
    step.replace_matrices({n: WatchedMatrix(n, shape, dtype, step.watched) for n, shape in shapes.items()})
    return [f"{WATCHED}{name}" for name in names]


def _text_rows(config: TransformerConfig, dtype: torch.dtype) -> list[Tensor]:
    if config.text is None:
        return []
    shape = (config.kv_heads, config.text.length, config.head_size)
    return [_empty(*shape, dtype=dtype) for _ in range(2 * config.layers)]


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")
