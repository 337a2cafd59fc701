"""The matrix products of a step whose weight is constant: what may be stored in fewer bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diagd.bundle.transformer import NormKind, TransformerConfig


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
    """One product x @ weight.

    Attributes:
        name: of the weight [inputs, outputs] in the graph.
        inputs, outputs: its size.
        fold: what absorbs a factor of x's channels; None where nothing does.
    """

    name: str
    inputs: int
    outputs: int
    fold: Fold | None = None


def projections(config: TransformerConfig) -> list[Projection]:
    """Products of the step graphs of a transformer, in the order of the graph."""
    found: list[Projection] = []
    for layer in range(config.layers):
        found += _layer(config, f"transformer.layers.{layer}.")
    if not config.tied_head:
        fold = _norm(config, "transformer.norm")
        found.append(Projection("transformer.head", config.hidden, config.output_vocabulary, fold))
    return found


def _layer(config: TransformerConfig, at: str) -> Iterator[Projection]:
    hidden, inner, width = config.hidden, config.feed_forward, config.heads * config.head_size
    yield Projection(f"{at}attention.qkv", hidden, config.qkv_width, _norm(config, f"{at}attention_norm"))
    yield Projection(f"{at}attention.out", width, hidden)
    if config.text:
        fold = _norm(config, f"{at}cross_attention_norm")
        yield Projection(f"{at}cross_attention.query", hidden, width, fold)
        yield Projection(f"{at}cross_attention.out", width, hidden)
    fold = _norm(config, f"{at}feed_forward_norm")
    if config.gated:  # silu(gate) * up: what divides a column of up divides what goes into down
        yield Projection(f"{at}feed_forward.gate_up", hidden, 2 * inner, fold)
        yield Projection(f"{at}feed_forward.down", inner, hidden, Fold((f"{at}feed_forward.gate_up",), inner))
    else:
        yield Projection(f"{at}feed_forward.up", hidden, inner, fold)
        yield Projection(f"{at}feed_forward.down", inner, hidden)


def _norm(config: TransformerConfig, name: str) -> Fold:
    shifted = config.norm is NormKind.LAYER and config.bias
    return Fold((f"{name}.weight", f"{name}.bias") if shifted else (f"{name}.weight",))
