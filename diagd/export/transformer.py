"""The transformer of every family: one pre-norm block with explicit options.

Matrices are stored [in, out], so that a graph reads them as they lie in the weights file. How queries meet
keys is left to a form, which is how one block serves training, full recomputation and every step graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from diagd.bundle.transformer import NormKind, TextShape, TransformerConfig, grid_sinusoids
from diagd.export.tracing import moved


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) with gate and up fused."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(hidden, 2 * inner))
        self.down = nn.Parameter(torch.empty(inner, hidden))

    def forward(self, x: Tensor, form: AttentionForm) -> Addends:
        """What the layer adds for x [..., hidden]."""
        fused = form.product(x, self.gate_up)
        shape = (*fused.shape[:-1], fused.shape[-1] // 2)
        (inner,) = form.part("SwiGLU", self._gated, (fused,), (shape,))
        return (form.product(inner, self.down),)

    @staticmethod
    def _gated(fused: Tensor) -> tuple[Tensor]:
        gate, up = fused.chunk(2, dim=-1)
        return (functional.silu(gate) * up,)


class GeluFeedForward(nn.Module):
    """down(gelu(up(x))) with the tanh form of GELU, as in GPT-2."""

    def __init__(self, hidden: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(hidden, inner))
        self.down = nn.Parameter(torch.empty(inner, hidden))
        self.up_bias = nn.Parameter(torch.zeros(inner)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(hidden)) if bias else None

    def forward(self, x: Tensor, form: AttentionForm) -> Addends:
        """What the layer adds for x [..., hidden]."""
        inner = form.product(x, self.up)
        name, inputs = ("GELU", (inner,)) if self.up_bias is None else ("BiasGELU", (inner, self.up_bias))
        (inner,) = form.part(name, self._activated, inputs, (inner.shape,))
        return given(form.product(inner, self.down), self.down_bias)

    @staticmethod
    def _activated(inner: Tensor, *bias: Tensor) -> tuple[Tensor]:
        return (functional.gelu(sum(bias, start=inner), approximate="tanh"),)


def given(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Those that there are."""
    return tuple(tensor for tensor in tensors if tensor is not None)


Addends = tuple[Tensor, ...]
"""Results of products, each with its bias behind it, that the residual stream has not been given yet."""

Part = Callable[..., tuple[Tensor, ...]]

Norm = nn.RMSNorm | nn.LayerNorm


class AttentionForm(ABC):
    """What stands between a layer's products, and how queries meet keys: over fed tokens or a KV cache."""

    def part(
        self,
        name: str,
        body: Part,
        inputs: Sequence[Tensor],
        shapes: Sequence[Sequence[int | torch.SymInt]],
        **attributes: float,
    ) -> tuple[Tensor, ...]:
        """What ``body`` gives of the inputs, tensors of their type and of these shapes.

        A form may make one operator ``name`` of it, whose kernel reads the attributes.
        """
        return body(*inputs)

    def product(self, x: Tensor, matrix: Tensor | nn.Module) -> Tensor:
        """``x`` [..., in] times a matrix [in, out], or what a module in the matrix's place makes of it."""
        result: Tensor = matrix(x) if isinstance(matrix, nn.Module) else x @ matrix
        return result

    @abstractmethod
    def attention(self, layer: int, heads: Heads, inputs: Sequence[Tensor]) -> Tensor:
        """Attended values [..., W, H * D] of what ``heads`` takes."""

    @abstractmethod
    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotary embedding of x [..., W, heads, D] with tables [..., W, D / 2]."""


def added(form: AttentionForm, x: Tensor, addends: Addends, norm: Norm) -> tuple[Tensor, ...]:
    """The residual stream x [..., W, hidden] with what it is given, and that normalised."""
    if not addends:
        return x, norm(x)

    def body(x: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        terms: list[Tensor] = []
        for term in inputs[: len(addends)]:
            terms = [*terms[:-1], terms[-1] + term] if term.dim() == 1 else [*terms, term]
        total = sum(terms, start=x)
        return total, normalised(norm, total, *inputs[len(addends) :])

    name = type(norm).__name__ + "".join("Bias" if addend.dim() == 1 else "Add" for addend in addends)
    inputs = (x, *addends, *norm.parameters())
    return form.part(name, body, inputs, (x.shape, x.shape), epsilon=norm.eps or 0.0)


def normalised(norm: Norm, x: Tensor, weight: Tensor, shift: Tensor | None = None) -> Tensor:
    """What a norm makes of ``x`` with other weights than its own."""
    shape = list(norm.normalized_shape)
    if isinstance(norm, nn.RMSNorm):
        return functional.rms_norm(x, shape, weight, norm.eps)
    return functional.layer_norm(x, shape, weight, shift, norm.eps)


def make_norm(config: TransformerConfig) -> Norm:
    """A norm of the residual stream (ONNX RMSNormalization-23 or LayerNormalization-17)."""
    if config.norm is NormKind.RMS:
        return nn.RMSNorm(config.hidden, config.norm_epsilon)
    return nn.LayerNorm(config.hidden, config.norm_epsilon, bias=config.bias)


@dataclass(frozen=True)
class PositionRows:
    """Rows of the position tables for the fed tokens.

    Attributes:
        rotary: cosines and sines, [..., W, head_size / 2] each.
        additive: [..., W, hidden], added before every layer.
    """

    rotary: tuple[Tensor, Tensor] | None
    additive: Tensor | None


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values [..., W, heads, D] of what one product gives, [..., W, (H + 2 G) D].

    It takes that product, then what the model has of: its bias, the norms' weights of queries and of keys,
    the rotary embedding's cosines and sines.
    """

    config: TransformerConfig

    @property
    def name(self) -> str:
        """Tells what it takes."""
        config = self.config
        return f"Attention{'Bias' * config.bias}{'Norm' * config.qk_norm}{'Rotary' * bool(config.rotary)}"

    @property
    def bare(self) -> Heads:
        """Those of heads that are all there is."""
        return Heads(replace(self.config, bias=False, qk_norm=False, rotary=None))

    def __call__(
        self, rotate: Callable[[Tensor, Tensor, Tensor], Tensor], fused: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of rows; ``rotate`` is that of a form."""
        config, further = self.config, iter(inputs)
        fused = fused + next(further) if config.bias else fused
        heads = fused.reshape(*fused.shape[:-1], config.heads + 2 * config.kv_heads, config.head_size)
        # slices, since an uneven split has ONNX Runtime's CUDA provider copy its sizes up, four times
        turned, values = heads[..., : -config.kv_heads, :], heads[..., -config.kv_heads :, :]
        if config.qk_norm:
            parts = turned[..., : config.heads, :], turned[..., config.heads :, :]
            shape, epsilon = (config.head_size,), config.norm_epsilon
            normed = [functional.rms_norm(part, shape, next(further), epsilon) for part in parts]
            turned = torch.cat(normed, dim=-2)
        if config.rotary:
            turned = rotate(turned, *further)
        return turned[..., : config.heads, :], turned[..., config.heads :, :], values


class Attention(nn.Module):
    """Projections around an attention that the caller supplies."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Parameter(torch.empty(config.hidden, config.qkv_width))
        self.out = nn.Parameter(torch.empty(config.query_width, config.hidden))
        self.qkv_bias = nn.Parameter(torch.zeros(config.qkv_width)) if config.bias else None
        self.out_bias = nn.Parameter(torch.zeros(config.hidden)) if config.bias else None
        if config.qk_norm:
            self.query_norm = nn.RMSNorm(config.head_size, config.norm_epsilon)
            self.key_norm = nn.RMSNorm(config.head_size, config.norm_epsilon)

    def forward(self, x: Tensor, rows: PositionRows, form: AttentionForm, layer: int) -> Addends:
        """What attention adds for x [..., W, hidden]."""
        norms = (self.query_norm.weight, self.key_norm.weight) if self.config.qk_norm else ()
        fused = form.product(x, self.qkv)
        inputs = given(fused, self.qkv_bias, *norms, *(rows.rotary or ()))
        attended = form.attention(layer, Heads(self.config), inputs)
        return given(form.product(attended, self.out), self.out_bias)


class CrossAttention(nn.Module):
    """Attention to text, whose keys and values are worked out once."""

    def __init__(self, config: TransformerConfig, text: TextShape) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Parameter(torch.empty(config.hidden, config.query_width))
        self.key_value = nn.Parameter(torch.empty(text.width, 2 * config.key_width))
        self.out = nn.Parameter(torch.empty(config.query_width, config.hidden))
        self.query_norm = nn.RMSNorm(config.head_size, config.norm_epsilon)
        self.key_norm = nn.RMSNorm(config.head_size, config.norm_epsilon)

    def text_rows(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [G, length, D] of text vectors [length, width]."""
        size = self.config.head_size
        keys, values = (text @ self.key_value).unflatten(-1, (2 * self.config.kv_heads, size)).chunk(2, -2)
        return self.key_norm(keys).transpose(0, 1), values.transpose(0, 1)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, form: AttentionForm) -> Tensor:
        """Attention output for x [..., W, hidden]; every text row is seen."""
        queries, norm = form.product(x, self.query), self.query_norm
        inputs = (queries, norm.weight, keys, values)
        (attended,) = form.part(
            "TextAttention", self._attended, inputs, (queries.shape,), epsilon=norm.eps or 0.0
        )
        return form.product(attended, self.out)

    def _attended(self, queries: Tensor, weight: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor]:
        groups, size = self.config.kv_heads, self.config.head_size
        shared = self.config.heads // groups
        batch = queries.shape[:-2]  # Reshape works out the rows
        queries = queries.reshape(*batch, -1, groups * shared, size)
        queries = normalised(self.query_norm, queries, weight)
        queries = moved(queries.reshape(*batch, -1, groups, shared, size) * size**-0.5, -4, -2)
        weights = torch.softmax(queries.reshape(*batch, groups, -1, size) @ keys.transpose(-1, -2), dim=-1)
        attended = moved((weights @ values).reshape(*batch, groups, shared, -1, size), -2, -4)
        return (attended.reshape(*batch, -1, groups * shared * size),)


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        if config.text:
            self.cross_attention_norm = make_norm(config)
            self.cross_attention = CrossAttention(config, config.text)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = (
            SwiGLU(config.hidden, config.feed_forward)
            if config.gated
            else GeluFeedForward(config.hidden, config.feed_forward, config.bias)
        )

    def forward(
        self,
        x: Tensor,
        addends: Addends,
        rows: PositionRows,
        form: AttentionForm,
        layer: int,
        text: Sequence[Tensor],
    ) -> tuple[Tensor, Addends]:
        """The residual stream and what it is still to be given, from those ahead of the layer.

        ``text`` is empty or the layer's keys and values.
        """
        x, states = added(form, x, (*addends, *given(rows.additive)), self.attention_norm)
        addends = self.attention(states, rows, form, layer)
        if text:
            x, states = added(form, x, addends, self.cross_attention_norm)
            addends = (self.cross_attention(states, text[0], text[1], form),)
        x, states = added(form, x, addends, self.feed_forward_norm)
        return x, self.feed_forward(states, form)


class Transformer(nn.Module):
    """Decoder over a token stream; its state dict is the canonical form of a model's weights."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocabulary, config.hidden))
        if config.slot_embedding:
            self.slot_embedding = nn.Parameter(torch.empty(config.layout.frame_length, config.hidden))
        if config.position_embedding:
            self.position_embedding = nn.Parameter(torch.empty(config.context_length, config.hidden))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        if not config.tied_head:
            self.head = nn.Parameter(torch.empty(config.hidden, config.output_vocabulary))
        for name, table in position_tables(config, self.embedding.device).items():
            self.register_buffer(name, table, persistent=False)

    def initialise(self, generator: torch.Generator | None = None) -> Transformer:
        """Draw every matrix from a normal distribution with standard deviation 1/sqrt(fan in), in place."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                continue
            deviation = 0.02 if "embedding" in name else parameter.shape[0] ** -0.5
            nn.init.normal_(parameter, std=deviation, generator=generator)
        return self

    def embed(self, ids: Tensor, positions: Tensor, form: AttentionForm) -> tuple[Tensor, PositionRows]:
        """Input of the first layer, [..., W, hidden], for ids and positions [..., W], and rows of tables."""
        config, layout = self.config, self.config.layout
        kinds = {
            "Slot": ["slot_embedding"] * config.slot_embedding,
            "Position": ["position_embedding"] * config.position_embedding,
            "Rotary": ["cosines", "sines"] * bool(config.rotary),
            "Added": ["layer_embedding"] * config.layer_embedding,
        }

        def body(ids: Tensor, positions: Tensor, embedding: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
            x, others = functional.embedding(ids, embedding), iter(tables)
            if config.slot_embedding:
                slots = (positions - layout.prefix) % layout.frame_length
                x = x + functional.embedding(slots, next(others))
            if config.position_embedding:
                x = x + functional.embedding(positions, next(others))
            return x, *(functional.embedding(positions, table) for table in others)

        names = ["embedding", *(name for named in kinds.values() for name in named)]
        tables = [getattr(self, name) for name in names]
        rows = [0, *(n for n, name in enumerate(names) if name in ("cosines", "sines", "layer_embedding"))]
        shapes = [(*ids.shape, tables[number].shape[-1]) for number in rows]
        x, *found = form.part(
            "Embed" + "".join(kind for kind, named in kinds.items() if named),
            body,
            (ids, positions, *tables),
            shapes,
            prefix=layout.prefix,
            frame_length=layout.frame_length,
        )
        rotary = (found[0], found[1]) if config.rotary else None
        return x, PositionRows(rotary, found[-1] if config.layer_embedding else None)

    def text_rows(self, text: Tensor) -> list[Tensor]:
        """Keys and values [kv_heads, length, head_size] of text [length, width], alternating by layer."""
        blocks = (block for block in self.layers if isinstance(block, Block))
        return [rows for block in blocks for rows in block.cross_attention.text_rows(text)]

    def states(
        self, ids: Tensor, positions: Tensor, form: AttentionForm, text: Sequence[Tensor] = ()
    ) -> Tensor:
        """Normalised hidden states [..., W, hidden] of the fed tokens; ``text`` is from ``text_rows``."""
        x, rows = self.embed(ids, positions, form)
        addends = Addends()
        for layer, block in enumerate(self.layers):
            x, addends = block(x, addends, rows, form, layer, text[2 * layer : 2 * layer + 2])
        return added(form, x, addends, self.norm)[1]

    def logits(self, states: Tensor, form: AttentionForm) -> Tensor:
        """Logits [..., output_vocabulary] of normalised states."""
        if self.config.tied_head:
            return functional.linear(states, self.embedding)
        return form.product(states, self.head)

    def forward(
        self, ids: Tensor, positions: Tensor, visible: Tensor | None = None, text: Tensor | None = None
    ) -> Tensor:
        """Logits of a whole sequence at once, for training and as an oracle.

        Args:
            ids: int64 [batch, R].
            positions: int64 [R] or [batch, R], below ``config.rotary_positions``.
            visible: bool [R, R] or [batch, R, R]; row r may attend to column c. None: causal in row order.
            text: float [length, width], for models that read text.

        Returns:
            float [batch, R, output_vocabulary].
        """
        rows = () if text is None else self.text_rows(text)
        form = FullAttention(visible)
        return self.logits(self.states(ids, positions, form, rows), form)


def position_tables(config: TransformerConfig, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Buffers of a transformer that follow from its configuration, float32, by name.

    ``cosines`` and ``sines`` [rotary_positions, head_size / 2]; ``layer_embedding`` [context_length, hidden],
    rounded to bfloat16 as released. On the meta device they have no data.
    """
    tables: dict[str, Tensor] = {}
    has_data = torch.device(device).type != "meta"
    if config.rotary and has_data:
        angles = torch.from_numpy(config.rotary.angles(config.layout, config.rotary_positions))
        tables |= {"cosines": angles.cos().float(), "sines": angles.sin().float()}
    elif config.rotary:  # the cosine of what has no data takes a second: PyTorch imports its compiler for it
        shape = config.rotary_positions, config.rotary.pairs
        tables |= {name: torch.empty(shape, device="meta") for name in ("cosines", "sines")}
    if config.layer_embedding:
        sinusoids = torch.empty(config.context_length, config.hidden, device="meta")
        if has_data:
            sinusoids = torch.from_numpy(grid_sinusoids(config.layout, *sinusoids.shape))
        tables["layer_embedding"] = sinusoids.bfloat16().float()
    return {name: table.to(device) for name, table in tables.items()}


class FullAttention(AttentionForm):
    """Attention among the fed tokens, with grouped KV heads; ``visible`` is ``Transformer.forward``'s."""

    def __init__(self, visible: Tensor | None) -> None:
        self._mask = visible if visible is None or visible.dim() == 2 else visible.unsqueeze(-3)

    @override
    def attention(self, layer: int, heads: Heads, inputs: Sequence[Tensor]) -> Tensor:
        return self.attend(layer, *heads(self.rotate, *inputs)).flatten(-2)

    @override
    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotate in rotate-half layout (ONNX RotaryEmbedding-23, interleaved = 0)."""
        cosines, sines = cosines.unsqueeze(-2), sines.unsqueeze(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries [..., W, H, D], new keys and values [..., W, G, D] -> [..., W, H, D]."""
        attended = functional.scaled_dot_product_attention(
            queries.transpose(-2, -3),
            keys.transpose(-2, -3),
            values.transpose(-2, -3),
            attn_mask=self._mask,
            is_causal=self._mask is None,
            enable_gqa=True,
        )
        return attended.transpose(-2, -3)
