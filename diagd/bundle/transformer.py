"""Dimensions and options of a transformer as data: a manifest records them, a module is built from them.

Position tables are functions of the raster position: rotary angles and additive sinusoids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from diagd.schedule import StreamLayout

Float = NDArray[np.float64]

Shape = tuple[int, ...]


class Axis(str, Enum):
    """Coordinate of a token that an angle is proportional to."""

    POSITION = "position"
    FRAME = "frame"
    ROW = "row"
    COLUMN = "column"


@dataclass(frozen=True)
class RotaryAxis:
    """Angles ``coordinate * frequency``, one frequency for each channel pair, in channel order."""

    axis: Axis
    frequencies: tuple[float, ...]


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding in rotate-half layout; the axes' pairs are concatenated to ``head_size / 2`` pairs."""

    axes: tuple[RotaryAxis, ...]

    @property
    def pairs(self) -> int:
        """Channel pairs, half the head size."""
        return sum(len(axis.frequencies) for axis in self.axes)

    def angles(self, layout: StreamLayout, positions: int) -> Float:
        """Angles of the first ``positions`` raster positions, float64 [positions, pairs], radians."""
        at = coordinates(layout, positions)
        return np.concatenate([np.outer(at[a.axis], a.frequencies) for a in self.axes], axis=1)

    def frame_angles(self, layout: StreamLayout) -> Float:
        """Angles by which one frame further turns a key, float64 [pairs]; equal for every cell."""
        per_frame = {Axis.POSITION: layout.frame_length, Axis.FRAME: 1, Axis.ROW: 0, Axis.COLUMN: 0}
        return np.concatenate([per_frame[a.axis] * np.asarray(a.frequencies) for a in self.axes])


def coordinates(layout: StreamLayout, positions: int) -> dict[Axis, NDArray[np.int64]]:
    """Coordinates of the first ``positions`` raster positions, int64 [positions] each.

    Prefix tokens stand at 0 on the grid axes; known tokens of a frame at its first cell.
    """
    position = np.arange(positions)
    behind = position - layout.prefix
    place = behind % layout.frame_length - layout.before
    cell = np.where((behind >= 0) & (place >= 0) & (place < layout.cells), place, 0)
    return {
        Axis.POSITION: position,
        Axis.FRAME: np.maximum(behind, 0) // layout.frame_length,
        Axis.ROW: cell // layout.columns,
        Axis.COLUMN: cell % layout.columns,
    }


def linear_rotary(head_size: int, theta: float) -> Rotary:
    """One-dimensional rotary over the raster position: frequency ``theta^(-2i/head_size)`` for pair i."""
    return Rotary((RotaryAxis(Axis.POSITION, geometric_frequencies(head_size, theta)),))


def grid_rotary(
    head_size: int, theta: float, *, yarn_scale: float = 1.0, trained: tuple[int, int] = (1, 1)
) -> Rotary:
    """Three-dimensional rotary of Cosmos: pairs of frame, row and column, in this order.

    Rows and columns get ``2 (head_size // 6)`` channels each, frames the rest. ``theta``: base of the
    frequencies. ``trained``: frames, and cells along either spatial axis, that the model was first trained
    on, see ``yarn``.
    """
    across = 2 * (head_size // 6)
    frames, cells = trained
    time = yarn(geometric_frequencies(head_size - 2 * across, theta), frames, yarn_scale)
    space = yarn(geometric_frequencies(across, theta), cells, yarn_scale)
    return Rotary((RotaryAxis(Axis.FRAME, time), RotaryAxis(Axis.ROW, space), RotaryAxis(Axis.COLUMN, space)))


def geometric_frequencies(channels: int, theta: float) -> tuple[float, ...]:
    """Frequencies ``theta^(-2i/channels)``, i = 0 .. channels/2 - 1."""
    return tuple(float(f) for f in theta ** (-np.arange(0, channels, 2, dtype=np.float64) / channels))


def yarn(frequencies: tuple[float, ...], trained: int, scale: float) -> tuple[float, ...]:
    """Frequencies stretched for a longer context (YaRN, arXiv 2309.00071, as released for Cosmos 12B).

    A frequency of more than four turns over the ``trained`` length is kept, one of fewer than one turn is
    divided by ``scale``, with a linear ramp between. The released code computes YaRN's factor of magnitude
    and does not apply it; neither do we.
    """
    frequency = np.asarray(frequencies)
    high, low = 2 * np.pi * 4.0 / trained, 2 * np.pi / trained
    ramp = np.clip((frequency - low) / (high - low), 0, 1)
    return tuple(float(f) for f in frequency * ((1 - ramp) / scale + ramp))


def grid_sinusoids(layout: StreamLayout, positions: int, width: int) -> NDArray[np.float32]:
    """Additive embedding of frame, row and column, float32 [positions, width]; prefix rows are 0.

    Rows and columns get ``2 (width // 6)`` channels each, frames the rest, in the order frame, row, column;
    each part is [sin | cos] of ``coordinate * 10000^(-i / pairs)``.
    """
    at = coordinates(layout, positions)
    across = 2 * (width // 6)
    table = np.zeros((positions, width), np.float32)
    start = 0
    for axis, channels in ((Axis.FRAME, width - 2 * across), (Axis.ROW, across), (Axis.COLUMN, across)):
        frequency = geometric_frequencies(channels, 10_000.0)
        angles = np.outer(np.arange(at[axis].max() + 1), frequency)
        part = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
        table[:, start : start + channels] = part[at[axis]]
        start += channels
    table[: layout.prefix] = 0
    return table


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
        vocabulary, output_vocabulary: ids of the embedding, and of the head: the first ones of those.
        hidden, feed_forward: width of the residual stream, and inside feed-forward layers.
        slot_embedding: add a learned vector for the place inside the frame.
        position_embedding: add a learned vector for the position inside the context.
        layer_embedding: add sinusoids of frame, row and column before every layer.
        norm: of the residual stream; ``norm_epsilon`` is every norm's.
        qk_norm: RMSNorm over each head's queries and keys, ahead of the rotary embedding.
        bias: projections, feed-forward layers and layer norms have one.
        gated: feed-forward layers are SwiGLU; otherwise GELU in its tanh form.
        tied_head: the head is the embedding.
        text: that every layer attends to as well.
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
