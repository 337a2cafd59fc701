"""Traces the step of a transformer in a form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diagd.bundle.manifest import Form
from diagd.bundle.transformer import TransformerConfig
from diagd.export.cache_rows import IntegerRows
from diagd.export.portable import PortableStep
from diagd.export.projections import projections
from diagd.export.step import ModernStep, PrefixStep, StepModule, TextRows
from diagd.export.tracing import trace
from diagd.export.transformer import Transformer
from diagd.export.watched import Watched, WatchedMatrix, WatchedRows

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
    variant: StepVariant = StepVariant(),
) -> ir.Model:
    """Trace one step graph on the meta device, its weights to be linked.

    Args:
        config: the transformer.
        form: ``prefix`` has a dynamic length; ``modern`` and ``portable`` a fixed capacity.
        dtype: of weights and KV buffers.
        capacity: slots of the KV buffers, where it is fixed.
        variant: other number formats, further outputs.
    """
    with torch.device("meta"):
        transformer = Transformer(config).to("meta", dtype)
    if form is Form.PREFIX:
        return _trace_prefix(transformer, dtype, variant)
    return _trace_fixed(transformer, form, dtype, capacity, variant)


def step_tensors(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the transformer's initializers in its graphs, by name, in the order of the weights file."""
    with torch.device("meta"):
        transformer = Transformer(config)
    tensors = {**dict(transformer.named_parameters()), **dict(transformer.named_buffers())}
    return {f"transformer.{name}": tuple(tensor.shape) for name, tensor in tensors.items()}


def watched_values(config: TransformerConfig, form: Form) -> dict[str, int]:
    """Channels of what a graph traced with ``watch`` gives out, by name, in the order of its outputs."""
    found = {projection.name: projection.inputs for projection in projections(config)}
    if form.traits.host:
        cached = [name.removeprefix("_") for name in cache_names(config.layers, "")]
        found |= dict.fromkeys(cached, config.kv_heads * config.head_size)
    return found


def _vary(step: StepModule, form: Form, dtype: torch.dtype, variant: StepVariant) -> list[str]:
    """Change a step into a variant of it; returns the names of its further outputs."""
    config = step.transformer.config
    if variant.integer_cache:
        middle = (1,) if form.traits.fixed else ()
        step.kv = IntegerRows(config, (config.kv_heads, *middle, config.head_size), dtype)
    step.replace_matrices(variant.matrices)
    if not variant.watch:
        return []
    step.watched = Watched(list(watched_values(config, form)))
    step.kv = WatchedRows(step.watched)
    step.replace_matrices(
        {
            projection.name: WatchedMatrix(
                projection.name, (projection.inputs, projection.outputs), dtype, step.watched
            )
            for projection in projections(config)
        }
    )
    return [f"{WATCHED}{name}" for name in step.watched.names]


def cache_names(layers: int, prefix: str) -> list[str]:
    """Names of the KV tensors of a graph, layer by layer, key before value."""
    return [f"{prefix}_{kind}_{layer}" for layer in range(layers) for kind in ("key", "value")]


def text_names(config: TransformerConfig) -> list[str]:
    """Names of the text's keys and values, none for models without text."""
    return cache_names(config.layers, "text") if config.text else []


def trace_text(config: TransformerConfig, dtype: torch.dtype = torch.float32) -> ir.Model:
    """Trace the graph from text float32 [length, width] to what the step graphs read of it.

    Its outputs are ``text_key_l`` and ``text_value_l`` [kv_heads, length, head_size], in ``dtype``.

    Raises:
        ValueError: the model reads no text.
    """
    if config.text is None:
        raise ValueError("the model reads no text")
    with torch.device("meta"):
        transformer = Transformer(config).to("meta", dtype)
    text = torch.zeros(config.text.length, config.text.width, device="meta")
    return trace(
        TextRows(transformer),
        (text,),
        input_names=["text"],
        output_names=text_names(config),
        opset=Form.PREFIX.traits.opset,
    )


def _text_rows(config: TransformerConfig, dtype: torch.dtype) -> list[Tensor]:
    if config.text is None:
        return []
    shape = (config.kv_heads, config.text.length, config.head_size)
    return [torch.zeros(shape, dtype=dtype, device="meta") for _ in range(2 * config.layers)]


def _int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device="meta")


def _trace_prefix(transformer: Transformer, dtype: torch.dtype, variant: StepVariant) -> ir.Model:
    config, step = transformer.config, PrefixStep(transformer)
    watched = _vary(step, Form.PREFIX, dtype, variant)
    rows, length, buffer, logits = 5, 11, 17, 3  # pairwise different, so that no two axes are taken for one
    past = [
        torch.zeros(length, config.kv_heads, config.head_size, dtype=dtype, device="meta")
        for _ in range(2 * config.layers)
    ]
    text = _text_rows(config, dtype)
    inputs: dict[str, tuple[Any, Any]] = {
        "token_buffer": (_int32(buffer), {0: "N"}),
        "sources": (_int32(rows), {0: "W"}),
        "positions": (_int32(rows), {0: "W"}),
        "slot_position": (_int32(length), {0: "T"}),
        "write_index": (torch.zeros(1, dtype=torch.int64, device="meta"), None),
        "logit_rows": (_int32(logits), {0: "R"}),
    }
    return trace(
        step,
        (*(tensor for tensor, _ in inputs.values()), past, text),
        input_names=[*inputs, *cache_names(config.layers, "past"), *text_names(config)],
        output_names=["logits", *cache_names(config.layers, "present"), *watched],
        opset=max(Form.PREFIX.traits.opset, variant.opset),
        dynamic_shapes=(*(axes for _, axes in inputs.values()), [{0: "T"}] * len(past), [None] * len(text)),
    )


def _trace_fixed(
    transformer: Transformer, form: Form, dtype: torch.dtype, capacity: int, variant: StepVariant
) -> ir.Model:
    """The forms of fixed capacity. Backends fix their dynamic width, and share one copy of the weights."""
    config, modern = transformer.config, form is Form.MODERN
    step = (ModernStep if modern else PortableStep)(transformer)
    watched = _vary(step, form, dtype, variant)
    stored = torch.int8 if variant.integer_cache else dtype
    rows, buffer = 5, 17  # different from each other and from every size of the model
    past = [
        torch.zeros(1, config.kv_heads, capacity, config.head_size, dtype=stored, device="meta")
        for _ in range(2 * config.layers)
    ]
    text = _text_rows(config, dtype)
    inputs: dict[str, tuple[Any, Any]] = {
        "token_buffer": (_int32(buffer), {0: "N"}),
        "sources": (_int32(rows), {0: "W"}),
        "positions": (_int32(rows), {0: "W"}),
        "slot_position": (_int32(capacity), None),
        "write_index": (torch.zeros(1, dtype=torch.int64, device="meta"), None),
    }
    cache = cache_names(config.layers, "present" if modern else "new")
    return trace(
        step,
        (*(tensor for tensor, _ in inputs.values()), past, text),
        input_names=[*inputs, *cache_names(config.layers, "past"), *text_names(config)],
        output_names=["logits", *cache, *watched],
        opset=max(form.traits.opset, variant.opset),
        dynamic_shapes=(*(axes for _, axes in inputs.values()), [None] * len(past), [None] * len(text)),
    )
