"""The transformer of every family: one pre-norm block with explicit options.

Matrices are stored [in, out], so that a graph reads them as they lie in the weights file. How queries meet
keys is left to a form, which is how one block serves training, full recomputation and every step graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from diagd.export.rotary import Rotary
from diagd.schedule import StreamLayout


class AttentionForm(Protocol):
    """How one layer's queries meet keys: over the fed tokens alone, or over a KV cache."""

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotary embedding of x [..., W, heads, D] with tables [..., W, D / 2]."""
        ...

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries [..., W, H, D], new keys and values [..., W, G, D] -> [..., W, H, D]."""
        ...


@dataclass(frozen=True)
class TransformerConfig:
    """Dimensions and options of a decoder.

    Attributes:
        layout: token stream; gives rotary coordinates and slot embeddings their period.
        context_frames: frames that training let a query see, its own included.
        vocabulary: ids of the embedding.
        output_vocabulary: ids of the head; the first ones of the vocabulary.
        hidden: width of the residual stream.
        feed_forward: inner width of the SwiGLU.
        layers, heads, kv_heads, head_size: attention dimensions.
        rotary: rotary embedding of queries and keys.
        slot_embedding: add a learned vector for the place inside the frame.
        norm_epsilon: of every RMSNorm.
    """

    layout: StreamLayout
    context_frames: int
    vocabulary: int
    output_vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    rotary: Rotary
    slot_embedding: bool = False
    norm_epsilon: float = 1e-5

    @property
    def context_length(self) -> int:
        """Positions of a full context."""
        return self.layout.frame_start(self.context_frames)

    @property
    def rotary_positions(self) -> int:
        """Rows of the rotary table: two contexts, so that cached keys are rotated back once per context."""
        return self.layout.frame_start(2 * self.context_frames + 2)

    @property
    def qkv_width(self) -> int:
        """Columns of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_size


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (ONNX RMSNormalization-23)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., width]."""
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)


class Attention(nn.Module):
    """Projections around an attention that the caller supplies."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Parameter(torch.empty(config.hidden, config.qkv_width))
        self.out = nn.Parameter(torch.empty(config.heads * config.head_size, config.hidden))

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor, form: AttentionForm, layer: int) -> Tensor:
        """Attention output for x [..., W, hidden]; cosines and sines [..., W, head_size / 2]."""
        config, fused = self.config, x @ self.qkv
        heads = fused.reshape(*fused.shape[:-1], config.heads + 2 * config.kv_heads, config.head_size)
        rotated, values = heads.split([config.heads + config.kv_heads, config.kv_heads], dim=-2)
        rotated = form.rotate(rotated, cosines, sines)
        queries, keys = rotated.split([config.heads, config.kv_heads], dim=-2)
        output: Tensor = form.attend(layer, queries, keys, values).flatten(-2) @ self.out
        return output


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) with gate and up fused."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.hidden, 2 * config.feed_forward))
        self.down = nn.Parameter(torch.empty(config.feed_forward, config.hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Feed-forward output for x [..., hidden]."""
        gate, up = (x @ self.gate_up).chunk(2, dim=-1)
        output: Tensor = (functional.silu(gate) * up) @ self.down
        return output


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden, config.norm_epsilon)
        self.feed_forward = SwiGLU(config)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor, form: AttentionForm, layer: int) -> Tensor:
        """The layer's output for x [..., W, hidden]."""
        x = x + self.attention(self.attention_norm(x), cosines, sines, form, layer)
        output: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return output


class Transformer(nn.Module):
    """Decoder over a token stream; its state dict is the canonical form of a model's weights."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocabulary, config.hidden))
        if config.slot_embedding:
            self.slot_embedding = nn.Parameter(torch.empty(config.layout.frame_length, config.hidden))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_epsilon)
        self.head = nn.Parameter(torch.empty(config.hidden, config.output_vocabulary))
        cosines, sines = rotary_tables(config)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)

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
        return x

    def states(self, ids: Tensor, positions: Tensor, form: AttentionForm) -> Tensor:
        """Normalised hidden states [..., W, hidden] of the fed tokens."""
        cosines = functional.embedding(positions, self.cosines)
        sines = functional.embedding(positions, self.sines)
        x = self.embed(ids, positions)
        for layer, block in enumerate(self.layers):
            x = block(x, cosines, sines, form, layer)
        output: Tensor = self.norm(x)
        return output

    def forward(self, ids: Tensor, positions: Tensor, visible: Tensor | None = None) -> Tensor:
        """Logits of a whole sequence at once, for training and as an oracle.

        Args:
            ids: int64 [batch, R].
            positions: int64 [R] or [batch, R], below ``config.rotary_positions``.
            visible: bool [R, R] or [batch, R, R]; row r may attend to column c. None: causal in row order.

        Returns:
            float [batch, R, output_vocabulary].
        """
        return self.states(ids, positions, FullAttention(visible)) @ self.head


def rotary_tables(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [rotary_positions, head_size / 2]; real data even on the meta device."""
    angles = config.rotary.angles(config.layout, config.rotary_positions)
    table = torch.tensor(angles, dtype=torch.float64, device="cpu")
    return table.cos().float(), table.sin().float()


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
        del layer
        attended = functional.scaled_dot_product_attention(
            queries.transpose(-2, -3),
            keys.transpose(-2, -3),
            values.transpose(-2, -3),
            attn_mask=self._mask,
            is_causal=self._mask is None,
            enable_gqa=True,
        )
        return attended.transpose(-2, -3)
