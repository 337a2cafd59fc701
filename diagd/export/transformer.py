"""The transformer of every family: one pre-norm block with explicit options.

Matrices are stored [in, out], so that a graph reads them as they lie in the weights file. How queries meet
keys is left to a form, which is how one block serves training, full recomputation and every step graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from diagd.bundle.transformer import NormKind, TextShape, TransformerConfig, grid_sinusoids
from diagd.export.tracing import moved


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) with gate and up fused."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(hidden, 2 * inner))
        self.down = nn.Parameter(torch.empty(inner, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Feed-forward output for x [..., hidden]."""
        gate, up = product(x, self.gate_up).chunk(2, dim=-1)
        return product(functional.silu(gate) * up, self.down)


class GeluFeedForward(nn.Module):
    """down(gelu(up(x))) with the tanh form of GELU, as in GPT-2."""

    def __init__(self, hidden: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(hidden, inner))
        self.down = nn.Parameter(torch.empty(inner, hidden))
        self.up_bias = nn.Parameter(torch.zeros(inner)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(hidden)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Feed-forward output for x [..., hidden]."""
        inner = functional.gelu(biased(product(x, self.up), self.up_bias), approximate="tanh")
        return biased(product(inner, self.down), self.down_bias)


def product(x: Tensor, matrix: Tensor | nn.Module) -> Tensor:
    """``x`` [..., in] times a matrix [in, out], or what a module in the matrix's place makes of it."""
    if isinstance(matrix, nn.Module):
        result: Tensor = matrix(x)
        return result
    return x @ matrix


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """``x + bias`` where there is one."""
    return x if bias is None else x + bias


class AttentionForm(Protocol):
    """How one layer's queries meet keys: over the fed tokens alone, or over a KV cache."""

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotary embedding of x [..., W, heads, D] with tables [..., W, D / 2]."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries [..., W, H, D], new keys and values [..., W, G, D] -> [..., W, H, D]."""


def make_norm(config: TransformerConfig) -> nn.Module:
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


class Attention(nn.Module):
    """Projections around an attention that the caller supplies."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.query_width
        self.qkv = nn.Parameter(torch.empty(config.hidden, config.qkv_width))
        self.out = nn.Parameter(torch.empty(width, config.hidden))
        self.qkv_bias = nn.Parameter(torch.zeros(config.qkv_width)) if config.bias else None
        self.out_bias = nn.Parameter(torch.zeros(config.hidden)) if config.bias else None
        if config.qk_norm:
            self.query_norm = nn.RMSNorm(config.head_size, config.norm_epsilon)
            self.key_norm = nn.RMSNorm(config.head_size, config.norm_epsilon)

    def forward(self, x: Tensor, rows: PositionRows, form: AttentionForm, layer: int) -> Tensor:
        """Attention output for x [..., W, hidden]."""
        config, fused = self.config, biased(product(x, self.qkv), self.qkv_bias)
        heads = fused.reshape(*fused.shape[:-1], config.heads + 2 * config.kv_heads, config.head_size)
        # slices, since an uneven split has ONNX Runtime's CUDA provider copy its sizes up, four times
        turned, values = heads[..., : -config.kv_heads, :], heads[..., -config.kv_heads :, :]
        if config.qk_norm:
            queries, keys = turned[..., : config.heads, :], turned[..., config.heads :, :]
            turned = torch.cat([self.query_norm(queries), self.key_norm(keys)], dim=-2)
        if rows.rotary is not None:
            turned = form.rotate(turned, *rows.rotary)
        queries, keys = turned[..., : config.heads, :], turned[..., config.heads :, :]
        attended = form.attend(layer, queries, keys, values).flatten(-2)
        return biased(product(attended, self.out), self.out_bias)


class CrossAttention(nn.Module):
    """Attention to text, whose keys and values are worked out once."""

    def __init__(self, config: TransformerConfig, text: TextShape) -> None:
        super().__init__()
        self.config = config
        width = config.query_width
        self.query = nn.Parameter(torch.empty(config.hidden, width))
        self.key_value = nn.Parameter(torch.empty(text.width, 2 * config.key_width))
        self.out = nn.Parameter(torch.empty(width, config.hidden))
        self.query_norm = nn.RMSNorm(config.head_size, config.norm_epsilon)
        self.key_norm = nn.RMSNorm(config.head_size, config.norm_epsilon)

    def text_rows(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [G, length, D] of text vectors [length, width]."""
        size = self.config.head_size
        keys, values = (text @ self.key_value).unflatten(-1, (2 * self.config.kv_heads, size)).chunk(2, -2)
        return self.key_norm(keys).transpose(0, 1), values.transpose(0, 1)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention output for x [..., W, hidden]; every text row is seen."""
        groups, size = self.config.kv_heads, self.config.head_size
        shared = self.config.heads // groups
        batch = x.shape[:-2]  # Reshape works out the rows
        queries = self.query_norm(product(x, self.query).reshape(*batch, -1, groups * shared, size))
        queries = moved(queries.reshape(*batch, -1, groups, shared, size) * size**-0.5, -4, -2)
        weights = torch.softmax(queries.reshape(*batch, groups, -1, size) @ keys.transpose(-1, -2), dim=-1)
        attended = moved((weights @ values).reshape(*batch, groups, shared, -1, size), -2, -4)
        return product(attended.reshape(*batch, -1, groups * shared * size), self.out)


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
        self, x: Tensor, rows: PositionRows, form: AttentionForm, layer: int, text: Sequence[Tensor]
    ) -> Tensor:
        """The layer's output for x [..., W, hidden]; ``text`` is empty or the layer's keys and values."""
        if rows.additive is not None:
            x = x + rows.additive
        x = x + self.attention(self.attention_norm(x), rows, form, layer)
        if text:
            x = x + self.cross_attention(self.cross_attention_norm(x), *text)
        output: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return output


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

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Input of the first layer, [..., W, hidden], for ids and positions [..., W]."""
        x = functional.embedding(ids, self.embedding)
        if self.config.slot_embedding:
            layout = self.config.layout
            slot = (positions - layout.prefix) % layout.frame_length
            x = x + functional.embedding(slot, self.slot_embedding)
        if self.config.position_embedding:
            x = x + functional.embedding(positions, self.position_embedding)
        return x

    def text_rows(self, text: Tensor) -> list[Tensor]:
        """Keys and values [kv_heads, length, head_size] of text [length, width], alternating by layer."""
        blocks = (block for block in self.layers if isinstance(block, Block))
        return [rows for block in blocks for rows in block.cross_attention.text_rows(text)]

    def states(
        self, ids: Tensor, positions: Tensor, form: AttentionForm, text: Sequence[Tensor] = ()
    ) -> Tensor:
        """Normalised hidden states [..., W, hidden] of the fed tokens; ``text`` is from ``text_rows``."""
        rows = self._position_rows(positions)
        x = self.embed(ids, positions)
        for layer, block in enumerate(self.layers):
            x = block(x, rows, form, layer, text[2 * layer : 2 * layer + 2])
        output: Tensor = self.norm(x)
        return output

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., output_vocabulary] of normalised states."""
        if self.config.tied_head:
            return functional.linear(states, self.embedding)
        return product(states, self.head)

    def _position_rows(self, positions: Tensor) -> PositionRows:
        def rows(name: str) -> Tensor | None:
            table = getattr(self, name, None)
            return None if table is None else functional.embedding(positions, table)

        cosines, sines = rows("cosines"), rows("sines")
        rotary = None if cosines is None or sines is None else (cosines, sines)
        return PositionRows(rotary, rows("layer_embedding"))

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
        return self.logits(self.states(ids, positions, FullAttention(visible), rows))


def position_tables(config: TransformerConfig, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Buffers of a transformer that follow from its configuration, float32, by name.

    ``cosines`` and ``sines`` [rotary_positions, head_size / 2]; ``layer_embedding`` [context_length, hidden],
    rounded to bfloat16 as released. On the meta device they have no data.
    """
    tables: dict[str, Tensor] = {}
    if config.rotary:
        shape = (config.rotary_positions, config.rotary.pairs)
        tables |= {name: torch.empty(shape, device="meta") for name in ("cosines", "sines")}
    if config.layer_embedding:
        tables["layer_embedding"] = torch.empty(config.context_length, config.hidden, device="meta")
    if torch.device(device).type == "meta":
        return tables
    if config.rotary:
        angles = torch.from_numpy(config.rotary.angles(config.layout, config.rotary_positions))
        tables |= {"cosines": angles.cos().float(), "sines": angles.sin().float()}
    if config.layer_embedding:
        sinusoids = grid_sinusoids(config.layout, config.context_length, config.hidden)
        tables["layer_embedding"] = torch.from_numpy(sinusoids).bfloat16().float()
    return {name: table.to(device) for name, table in tables.items()}


class FullAttention:
    """Attention among the fed tokens themselves, with grouped KV heads.

    Args:
        visible: bool [R, R] or [batch, R, R]; row r may attend to column c. None: causal in row order.
    """

    def __init__(self, visible: Tensor | None) -> None:
        self._mask = visible if visible is None or visible.dim() == 2 else visible.unsqueeze(-3)

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotate in rotate-half layout (ONNX RotaryEmbedding-23, interleaved = 0)."""
        cosines, sines = cosines.unsqueeze(-2), sines.unsqueeze(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Scaled dot-product attention over the rows fed."""
        attended = functional.scaled_dot_product_attention(
            queries.transpose(-2, -3),
            keys.transpose(-2, -3),
            values.transpose(-2, -3),
            attn_mask=self._mask,
            is_causal=self._mask is None,
            enable_gqa=True,
        )
        return attended.transpose(-2, -3)
