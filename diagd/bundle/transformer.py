"""Dimensions and options of a transformer as data: a manifest records them, a module is built from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from diagd.bundle.rotary import Rotary
from diagd.schedule import StreamLayout

Shape = tuple[int, ...]


class NormKind(str, Enum):
    """``RMS``: scale only. ``LAYER``: centred and scaled, with a shift where the model has biases."""

    RMS = "rms"
    LAYER = "layer"


@dataclass(frozen=True)
class TextShape:
    """Text that cross-attention reads: vectors [length, width]."""

    length: int
    width: int


@dataclass(frozen=True)
class TransformerConfig:
    """Dimensions and options of a decoder.

    Attributes:
        layout: token stream; gives rotary coordinates and slot embeddings their period.
        context_frames: frames that training let a query see, its own included.
        vocabulary: ids of the embedding.
        output_vocabulary: ids of the head; the first ones of the vocabulary.
        hidden: width of the residual stream.
        feed_forward: inner width of the feed-forward layer.
        layers, heads, kv_heads, head_size: attention dimensions.
        rotary: rotary embedding of queries and keys; None without.
        slot_embedding: add a learned vector for the place inside the frame.
        position_embedding: add a learned vector for the position inside the context.
        layer_embedding: add sinusoids of frame, row and column before every layer.
        norm: of the residual stream.
        norm_epsilon: of every norm.
        qk_norm: RMSNorm over each head's queries and keys, ahead of the rotary embedding.
        bias: projections, feed-forward layers and layer norms have one.
        gated: feed-forward layers are SwiGLU; otherwise GELU in its tanh form.
        tied_head: the head is the embedding.
        text: every layer also attends to text; None without.
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
    rotary: Rotary | None
    slot_embedding: bool = False
    position_embedding: bool = False
    layer_embedding: bool = False
    norm: NormKind = NormKind.RMS
    norm_epsilon: float = 1e-5
    qk_norm: bool = False
    bias: bool = False
    gated: bool = True
    tied_head: bool = False
    text: TextShape | None = None

    @property
    def context_length(self) -> int:
        """Positions of a full context."""
        return self.layout.frame_start(self.context_frames)

    @property
    def absolute(self) -> bool:
        """Whether hidden states depend on positions themselves, not only on their differences."""
        return self.position_embedding or self.layer_embedding

    @property
    def rotary_positions(self) -> int:
        """Rows of the rotary table.

        Two contexts, so that cached keys are rotated back once per context; one where that is no use.
        """
        return self.context_length if self.absolute else self.layout.frame_start(2 * self.context_frames + 2)

    @property
    def query_width(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """Channels of all key heads, and of all value heads."""
        return self.kv_heads * self.head_size

    @property
    def qkv_width(self) -> int:
        """Columns of the fused query, key and value projection."""
        return self.query_width + 2 * self.key_width

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in parameter_shapes(self).values())

    @property
    def looked_up_parameters(self) -> int:
        """Parameters that a step does not stream.

        Embeddings are read by row, unless they are the head as well; a text's keys and values are made once.
        """
        rows = 0 if self.tied_head else self.vocabulary
        rows += self.layout.frame_length if self.slot_embedding else 0
        rows += self.context_length if self.position_embedding else 0
        text = self.layers * self.text.width * 2 * self.key_width if self.text else 0
        return rows * self.hidden + text


def parameter_shapes(config: TransformerConfig) -> dict[str, Shape]:
    """Names and shapes of a transformer's parameters, in the order of its module; matrices are [in, out]."""
    hidden = config.hidden
    shapes: dict[str, Shape] = {"embedding": (config.vocabulary, hidden)}
    if config.slot_embedding:
        shapes["slot_embedding"] = (config.layout.frame_length, hidden)
    if config.position_embedding:
        shapes["position_embedding"] = (config.context_length, hidden)
    if not config.tied_head:
        shapes["head"] = (hidden, config.output_vocabulary)
    layer = _layer_shapes(config)
    for index in range(config.layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes | _norm(config, "norm")


def _layer_shapes(config: TransformerConfig) -> dict[str, Shape]:
    hidden, query, inner = config.hidden, config.query_width, config.feed_forward
    shapes = _norm(config, "attention_norm")
    shapes |= {"attention.qkv": (hidden, config.qkv_width), "attention.out": (query, hidden)}
    if config.bias:
        shapes |= {"attention.qkv_bias": (config.qkv_width,), "attention.out_bias": (hidden,)}
    if config.qk_norm:
        shapes |= _head_norms(config, "attention")
    if config.text:
        shapes |= _norm(config, "cross_attention_norm")
        shapes |= {
            "cross_attention.query": (hidden, query),
            "cross_attention.key_value": (config.text.width, 2 * config.key_width),
            "cross_attention.out": (query, hidden),
        }
        shapes |= _head_norms(config, "cross_attention")
    shapes |= _norm(config, "feed_forward_norm")
    up = {"gate_up": (hidden, 2 * inner)} if config.gated else {"up": (hidden, inner)}
    matrices: dict[str, Shape] = {**up, "down": (inner, hidden)}
    if config.bias and not config.gated:
        matrices |= {"up_bias": (inner,), "down_bias": (hidden,)}
    return shapes | {f"feed_forward.{name}": shape for name, shape in matrices.items()}


def _norm(config: TransformerConfig, name: str) -> dict[str, Shape]:
    shifted = config.norm is NormKind.LAYER and config.bias
    return {f"{name}.{part}": (config.hidden,) for part in ("weight", "bias")[: 1 + shifted]}


def _head_norms(config: TransformerConfig, name: str) -> dict[str, Shape]:
    return {f"{name}.{norm}.weight": (config.head_size,) for norm in ("query_norm", "key_norm")}
