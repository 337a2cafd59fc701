"""What sets a step graph apart from the plain one: other number formats, and values that become outputs.

The matrix products whose weight is constant may be stored in fewer bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diagd.bundle.transformer import Shape, TransformerConfig, parameter_shapes
from diagd.engines.tensors import cache_tensors
from diagd.export.tracing import onnx_operator


class CacheRows(nn.Module):
    """What K/V rows become on their way into the cache and out of it: themselves."""

    def store(self, name: str, rows: Tensor) -> Tensor:
        """What the buffer ``name``, such as ``key_0``, takes."""
        return rows

    def load(self, stored: Tensor) -> Tensor:
        """What attention reads of a buffer; the factors that ``scaled`` multiplies are left out."""
        return stored

    def scaled(self, name: str, x: Tensor) -> Tensor:
        """``x`` [..., D] times the factors of a buffer's channels."""
        return x


class IntegerRows(CacheRows):
    """Rows as ``round(row / scale)`` in int8, a scale for each channel of each head.

    Scores are products of queries and keys, so that the scales of keys may multiply the queries, and those
    of values what attention returns: no work of a channel grows with the cache. The scales, [G, D] or [G, 1,
    D] as rows lie, are buffers named like those of K/V.
    """

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


NORMS = {
    "attention.qkv": "attention_norm",
    "cross_attention.query": "cross_attention_norm",
    "feed_forward.gate_up": "feed_forward_norm",
    "feed_forward.up": "feed_forward_norm",
    "head": "norm",
}
"""The norm ahead of a product, in its layer."""


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
