"""Norms and feed-forward layers; matrices are stored [in, out]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (ONNX RMSNormalization-23)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., width]."""
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)


class LayerNorm(nn.Module):
    """Layer norm over the last axis (ONNX LayerNormalization-17); without ``bias`` it only scales."""

    def __init__(self, width: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., width]."""
        return functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.epsilon)


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
