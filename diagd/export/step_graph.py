"""The frontier-step graph: one forward pass over a KV cache, traced in the form that a backend wants.

Prefill, next-token prediction, diagonal steps and verification are this one graph. A form says how attention
meets the cache; everything else is the transformer itself. Variants of it have other number formats, as the
matrix products whose weight is constant may be stored in fewer bits, and values that become outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from diagd.bundle.manifest import Form, FormTraits
from diagd.bundle.transformer import Shape, TransformerConfig, parameter_shapes
from diagd.engines.tensors import cache_tensors
from diagd.export.forms import Bound, CacheRows, ModernAttention, PortableAttention, PrefixAttention
from diagd.export.known_graphs import traced_once
from diagd.export.layers import mark_ends, models, number_in, numbered, repeat
from diagd.export.tracing import FunctionModule, Functions, cast, onnx_operator
from diagd.export.transformer import Transformer
from diagd.schedule import StreamLayout

if TYPE_CHECKING:
    import onnx_ir as ir

WATCHED = "watched."
"""Beginning of the names of outputs that show what is inside a step."""

PLAIN = ".plain"
"""Ending of a matrix's name where the module in its place has the matrix as well."""

NORMS = {
    "attention.qkv": "attention_norm",
    "cross_attention.query": "cross_attention_norm",
    "feed_forward.gate_up": "feed_forward_norm",
    "feed_forward.up": "feed_forward_norm",
    "head": "norm",
}
"""The norm ahead of a product, in its layer."""

ATTENTIONS: Final[dict[Form, type[PrefixAttention] | type[ModernAttention] | type[PortableAttention]]] = {
    Form.PREFIX: PrefixAttention,
    Form.MODERN: ModernAttention,
    Form.PORTABLE: PortableAttention,
}


class IntegerRows(CacheRows):
    """Rows as ``round(row / scale)`` in int8, a scale for each channel of each head.

    Scores are products of queries and keys, so that the scales of keys may multiply the queries, and those
    of values what attention returns: no work of a channel grows with the cache. The scales, [G, D] or [G, 1,
    D] as rows lie, are buffers named like those of K/V.
    """

    change = True
    unit: Tensor
    zero: Tensor

    def __init__(self, config: TransformerConfig, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        for name in cache_tensors(config.layers):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.register_buffer("unit", torch.empty((), dtype=dtype, device="meta"))
        self.register_buffer("zero", torch.empty((), dtype=torch.int8, device="meta"))

    def store(self, name: str, rows: Tensor) -> Tensor:
        """Integers."""
        scaled = rows / self.get_buffer(name)
        return onnx_operator("QuantizeLinear", (scaled, self.unit, self.zero), torch.int8, rows.shape)

    def load(self, stored: Tensor) -> Tensor:
        """Floating point again."""
        # No zero point is named: ONNX Runtime 1.31 gives nodes that it moves one of another type.
        return onnx_operator("DequantizeLinear", (stored, self.unit), self.unit.dtype, stored.shape)

    def scaled(self, name: str, x: Tensor) -> Tensor:
        """Times the buffer's scales."""
        return x * self.get_buffer(name)


class Watched(dict[str, Tensor]):
    """Values inside a step that become further outputs of its graph, in order.

    The exporter refuses a module whose tensors change while it is traced, and looks for them in plain dicts.
    """


class WatchedMatrix(nn.Module):
    """A matrix [inputs, outputs], as ``plain``, whose input is noted in ``seen`` under its name."""

    def __init__(self, name: str, shape: tuple[int, int], dtype: torch.dtype, seen: Watched) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        self._name, self._seen = name, seen

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., inputs] times the matrix."""
        self._seen[self._name] = x
        return x @ self.plain


class WatchedRows(CacheRows):
    """Rows as they are, noted in ``seen`` by name of their buffer."""

    change = True

    def __init__(self, seen: Watched) -> None:
        super().__init__()
        self._seen = seen

    def store(self, name: str, rows: Tensor) -> Tensor:
        """Note the rows."""
        self._seen[name] = rows
        return rows


@dataclass(frozen=True)
class Fold:
    """What absorbs a factor of a product's input channels exactly.

    The factor divides entries ``start``... of the last axis of ``tensors``, which are the gain and shift of
    the norm ahead, or columns of the matrix ahead.
    """

    tensors: tuple[str, ...]
    start: int = 0


@dataclass(frozen=True)
class Projection:
    """One product x @ weight; ``name`` is that of the weight [inputs, outputs] in the graph.

    ``fold``: what absorbs a factor of x's channels; None where nothing does.
    """

    name: str
    inputs: int
    outputs: int
    fold: Fold | None = None


def projections(config: TransformerConfig) -> list[Projection]:
    """Products of the step graphs of a transformer, in the order of the graph."""
    shapes = parameter_shapes(config)
    read_by_row_or_once = ("embedding", "key_value")
    names = [n for n, shape in shapes.items() if len(shape) == 2 and not n.endswith(read_by_row_or_once)]
    names.sort(key="head".__eq__)
    return [
        Projection(f"transformer.{n}", shapes[n][0], shapes[n][1], _fold(config, shapes, n)) for n in names
    ]


def _fold(config: TransformerConfig, shapes: Mapping[str, Shape], name: str) -> Fold | None:
    *layer, part = name.split(".", 2) if name.startswith("layers.") else [name]
    at = "".join(f"{word}." for word in layer)
    if part == "feed_forward.down" and config.gated:
        # silu(gate) * up: what divides a column of up divides what goes into down
        return Fold((f"transformer.{at}feed_forward.gate_up",), config.feed_forward)
    tensors = [f"{at}{NORMS[part]}.{end}" for end in ("weight", "bias")] if part in NORMS else []
    return Fold(tuple(f"transformer.{tensor}" for tensor in tensors if tensor in shapes)) if tensors else None


class Step(nn.Module):
    """One step in a form.

    Inputs: token_buffer int32 [N], sources and positions int32 [W], slot_position int32 [S], write_index
    int64 [1], past_key_l and past_value_l. Outputs: logits float32 [W, V]; then present_key_l and
    present_value_l, or new_key_l and new_value_l [1, G, W, D], which belong at ``write_index + arange(W)``.
    Of several streams: sources and positions [B, W], slot_position [B, S], write_index [B], logits
    [B * W, V], caches and rows [B, ...]; the token buffer holds the tokens of all. Where the width is
    dynamic, so is their number: slot_position is [T, B] then, write_index [B, W] has the slot of every row,
    and logits are those of logit_rows int32 [R] of the B * W rows.

    Attributes:
        transformer: the model; matrices of it may be replaced.
        kv: what K/V rows become in the cache.
        watched: values that become further outputs, behind the others.
        functions: of its graph, once it is traced.
    """

    def __init__(self, transformer: Transformer, form: Form) -> None:
        super().__init__()
        self.transformer, self.form = transformer, form
        self.kv, self.watched, self.functions = CacheRows(), Watched(), Functions(transformer.config)

    def replace_matrices(self, matrices: Mapping[str, nn.Module]) -> None:
        """Put modules in the place of matrices, by name in the graph."""
        for name, module in matrices.items():
            for part in module.modules():
                if isinstance(part, FunctionModule):
                    part.functions = self.functions
            parent, _, leaf = name.rpartition(".")
            owner = self.get_submodule(parent)
            delattr(owner, leaf)
            setattr(owner, leaf, module)

    def forward(
        self,
        token_buffer: Tensor,
        sources: Tensor,
        positions: Tensor,
        slot_position: Tensor,
        write_index: Tensor,
        logit_rows: Tensor | None,
        past: Sequence[Tensor],
        text: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """One step; ``past`` and ``text`` alternate keys and values, layer by layer."""
        shared = self.transformer.config.heads // self.transformer.config.kv_heads
        bound = Bound(shared, positions, slot_position, write_index, past, self.kv, self.functions)
        attention = ATTENTIONS[self.form](bound)
        ids = token_buffer.index_select(0, sources.flatten())
        states = self.transformer.states(ids, positions.flatten(), attention, text)
        if logit_rows is not None:
            states = states.index_select(0, logit_rows)
        logits = cast(self.transformer.logits(states, attention), torch.float32)
        return logits, *attention.cache, *self.watched.values()


class TextRows(nn.Module):
    """The text's keys and values of every layer, worked out once for a text."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, text: Tensor) -> tuple[Tensor, ...]:
        """Text float32 [length, width] -> keys and values [G, length, D], alternating by layer."""
        return tuple(self.transformer.text_rows(cast(text, self.transformer.embedding.dtype)))


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
    alike = models(config.layers, variant.matrices)
    traced = sorted(set(alike))
    some = replace(config, layers=len(traced))
    matrices = {
        name if layer is None else numbered(name, traced.index(layer)): matrix
        for name, matrix in variant.matrices.items()
        if (layer := number_in(name)) is None or layer in traced
    }
    step = Step(_transformer(some, dtype), form)
    _vary(step, dtype, replace(variant, matrices=matrices))
    inputs, names = _inputs(traits, capacity, streams), _names(some, form, variant)
    slots, live = inputs["slot_position"]
    sizes = (streams, config.kv_heads, capacity) if traits.fixed else (*slots.shape, config.kv_heads)
    stored = torch.int8 if variant.integer_cache and traits.float_cache is None else dtype
    past = [_empty(*sizes, config.head_size, dtype=stored) for _ in range(2 * some.layers)]
    shape = (config.kv_heads, config.text.length, config.head_size) if config.text else ()
    text = [_empty(*shape, dtype=dtype) for _ in text_names(some)]
    if some != config:
        mark_ends(step.transformer.layers)
    model = traced_once(
        step,
        (*(tensor for tensor, _ in inputs.values()), past, text),
        input_names=names[0],
        output_names=names[1],
        opset=max(traits.opset, variant.opset),
        dynamic_shapes=(*(axes for _, axes in inputs.values()), [live] * len(past), [None] * len(text)),
        functions=step.functions,
    )
    if some == config:
        return model
    return repeat(model, [traced.index(layer) for layer in alike], *_names(config, form, variant))


def _names(config: TransformerConfig, form: Form, variant: StepVariant) -> tuple[list[str], list[str]]:
    """Inputs and outputs of a graph."""
    inputs = [name for name, (tensor, _) in _inputs(form.traits, 0, 1).items() if tensor is not None]
    cache = cache_names(config.layers, "new" if form.traits.rows_out else "present")
    watched = [f"{WATCHED}{name}" for name in watched_values(config, form)] if variant.watch else []
    return [*inputs, *cache_names(config.layers, "past"), *text_names(config)], ["logits", *cache, *watched]


def _inputs(traits: FormTraits, capacity: int, streams: int) -> dict[str, tuple[Any, Any]]:
    """Examples and dynamic axes of a step's inputs but the cache, by name; None: the form has none."""
    rows, buffer, logits = 5, 17, 3  # pairwise different, so that no two axes are taken for one
    lead = (2,) if not traits.fixed else (streams,) if streams > 1 else ()
    grid = {len(lead): "W"} if traits.fixed else {0: "B", 1: "W"}
    index = (streams,) if traits.fixed else (2, rows)
    slots = (_empty(*lead, capacity), None) if traits.fixed else (_empty(11, 2), {0: "T", 1: "B"})
    return {
        "token_buffer": (_empty(buffer), {0: "N"}),
        "sources": (_empty(*lead, rows), grid),
        "positions": (_empty(*lead, rows), grid),
        "slot_position": slots,
        "write_index": (_empty(*index, dtype=torch.int64), None if traits.fixed else grid),
        "logit_rows": (None, None) if traits.fixed else (_empty(logits), {0: "R"}),
    }


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
        (_empty(text.length, text.width, dtype=torch.float32),),
        input_names=["text"],
        output_names=text_names(config),
        opset=Form.PREFIX.traits.opset,
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


def _vary(step: Step, dtype: torch.dtype, variant: StepVariant) -> None:
    """Change a step into a variant of it."""
    config = step.transformer.config
    if variant.integer_cache:
        middle = (1,) if step.form.traits.fixed else ()
        step.kv = IntegerRows(config, (config.kv_heads, *middle, config.head_size), dtype)
    step.replace_matrices(variant.matrices)
    if not variant.watch:
        return
    names = watched_values(config, step.form)
    step.watched = Watched(dict.fromkeys(names, torch.empty(0)))  # in the order of the outputs
    if step.form.traits.host:  # other forms give new rows out as they are
        step.kv = WatchedRows(step.watched)
    shapes = {p.name: (p.inputs, p.outputs) for p in projections(config)}
    step.replace_matrices({n: WatchedMatrix(n, shape, dtype, step.watched) for n, shape in shapes.items()})


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")
