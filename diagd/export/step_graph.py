"""Traces the step of a transformer in a form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diagd.bundle.manifest import Form, SamplingRules
from diagd.export.sampler import GraphSampler
from diagd.export.step import ModernStep, PrefixStep
from diagd.export.tracing import trace
from diagd.export.transformer import Transformer, TransformerConfig

if TYPE_CHECKING:
    import onnx_ir as ir

PREFIX_OPSET = 23
MODERN_OPSET = 24


def trace_step(
    config: TransformerConfig,
    form: Form,
    sampling: SamplingRules,
    *,
    dtype: torch.dtype = torch.float32,
    width: int = 1,
    capacity: int = 0,
) -> ir.Model:
    """Trace one step graph on the meta device, its weights to be linked.

    Args:
        config: the transformer.
        form: ``prefix`` (dynamic width and length) or ``modern`` (fixed width and capacity).
        sampling: ids allowed and the nucleus rule; used where the sampler is in the graph.
        dtype: of weights and KV buffers.
        width: rows of a step, for fixed forms.
        capacity: slots of the KV buffers, for fixed forms.
    """
    with torch.device("meta"):
        transformer = Transformer(config).to("meta", dtype)
    trace_form = {Form.PREFIX: _trace_prefix, Form.MODERN: _trace_modern}[form]
    return trace_form(transformer, sampling, dtype, width, capacity)


def cache_names(layers: int, prefix: str) -> list[str]:
    """Names of the KV tensors of a graph, layer by layer, key before value."""
    return [f"{prefix}_{kind}_{layer}" for layer in range(layers) for kind in ("key", "value")]


def _int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device="meta")


def _trace_prefix(
    transformer: Transformer, sampling: SamplingRules, dtype: torch.dtype, width: int, capacity: int
) -> ir.Model:
    del sampling, width, capacity
    config = transformer.config
    rows, length, buffer, logits = 5, 11, 17, 3  # pairwise different, so that no two axes are taken for one
    past = [
        torch.zeros(length, config.kv_heads, config.head_size, dtype=dtype, device="meta")
        for _ in range(2 * config.layers)
    ]
    inputs: dict[str, tuple[Any, Any]] = {
        "token_buffer": (_int32(buffer), {0: "N"}),
        "sources": (_int32(rows), {0: "W"}),
        "positions": (_int32(rows), {0: "W"}),
        "slot_position": (_int32(length), {0: "T"}),
        "write_index": (torch.zeros(1, dtype=torch.int64, device="meta"), None),
        "logit_rows": (_int32(logits), {0: "R"}),
    }
    return trace(
        PrefixStep(transformer),
        (*(tensor for tensor, _ in inputs.values()), past),
        input_names=[*inputs, *cache_names(config.layers, "past")],
        output_names=["logits", *cache_names(config.layers, "present")],
        opset=PREFIX_OPSET,
        dynamic_shapes=(*(axes for _, axes in inputs.values()), [{0: "T"}] * len(past)),
    )


def _trace_modern(
    transformer: Transformer, sampling: SamplingRules, dtype: torch.dtype, width: int, capacity: int
) -> ir.Model:
    config = transformer.config
    ranges = torch.tensor(sampling.range_table(config.layout), dtype=torch.int32).to("meta")
    step = ModernStep(transformer, GraphSampler(keep_crossing=sampling.keep_crossing), ranges)
    past = [
        torch.zeros(1, config.kv_heads, capacity, config.head_size, dtype=dtype, device="meta")
        for _ in range(2 * config.layers)
    ]
    inputs: dict[str, tuple[Any, Any]] = {
        "token_buffer": (_int32(17), {0: "N"}),
        "sources": (_int32(width), None),
        "positions": (_int32(width), None),
        "sinks": (_int32(width), None),
        "slot_position": (_int32(capacity), None),
        "write_index": (torch.zeros(1, dtype=torch.int64, device="meta"), None),
        "uniforms": (torch.zeros(width, device="meta"), None),
        "temperature": (torch.zeros((), device="meta"), None),
        "top_k": (_int32(), None),
        "top_p": (torch.zeros((), device="meta"), None),
    }
    return trace(
        step,
        (*(tensor for tensor, _ in inputs.values()), past),
        input_names=[*inputs, *cache_names(config.layers, "past")],
        output_names=["next_token_buffer", "logits", *cache_names(config.layers, "present")],
        opset=MODERN_OPSET,
        dynamic_shapes=(*(axes for _, axes in inputs.values()), [None] * len(past)),
    )
