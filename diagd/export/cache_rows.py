"""What K/V rows become on their way into the cache and out of it: themselves, or integers of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diagd.bundle.transformer import TransformerConfig
from diagd.export.tracing import onnx_operator


class CacheRows(nn.Module):
    """Rows as they are."""

    def store(self, name: str, rows: Tensor) -> Tensor:
        """What the buffer ``name``, such as ``key_0``, takes."""
        del name
        return rows

    def load(self, stored: Tensor) -> Tensor:
        """What attention reads of a buffer; the factors that ``scaled`` multiplies are left out."""
        return stored

    def scaled(self, name: str, x: Tensor) -> Tensor:
        """``x`` [..., D] times the factors of a buffer's channels."""
        del name
        return x


class IntegerRows(CacheRows):
    """Rows as ``round(row / scale)`` in int8, a scale for each channel of each head.

    Scores are products of queries and keys, so that the scales of keys may multiply the queries, and those of
    values what attention returns: no work of a channel grows with the cache.

    Args:
        config: of the transformer.
        shape: of the scales, [G, D] or [G, 1, D] as rows lie; they are buffers named like those of K/V.
        dtype: of activations.
    """

    unit: Tensor
    zero: Tensor

    def __init__(self, config: TransformerConfig, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        for layer in range(config.layers):
            for kind in ("key", "value"):
                self.register_buffer(f"{kind}_{layer}", torch.empty(shape, dtype=dtype, device="meta"))
        self.register_buffer("unit", torch.empty((), dtype=dtype, device="meta"))
        self.register_buffer("zero", torch.empty((), dtype=torch.int8, device="meta"))

    def store(self, name: str, rows: Tensor) -> Tensor:
        """Integers; see ``CacheRows.store``."""
        scaled = rows / self.get_buffer(name)
        return onnx_operator("QuantizeLinear", (scaled, self.unit, self.zero), torch.int8, rows.shape)

    def load(self, stored: Tensor) -> Tensor:
        """Floating point again; see ``CacheRows.load``."""
        # No zero point is named: ONNX Runtime 1.31 gives nodes that it moves one of another type.
        return onnx_operator("DequantizeLinear", (stored, self.unit), self.unit.dtype, stored.shape)

    def scaled(self, name: str, x: Tensor) -> Tensor:
        """See ``CacheRows.scaled``."""
        return x * self.get_buffer(name)
