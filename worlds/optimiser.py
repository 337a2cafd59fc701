"""Muon for the matrices of the blocks, AdamW for everything else, one learning-rate curve for both."""

from __future__ import annotations

import torch
from torch import nn

WARM_UP, WARM_UP_SHARE, FLAT_UNTIL = 60, 0.2, 0.3


class Optimiser:
    """Two optimisers that step together.

    Muon (Jordan 2024) orthogonalises the momentum of a matrix; it does not suit embeddings, head and gains.
    """

    def __init__(self, model: nn.Module, matrix_rate: float, other_rate: float) -> None:
        matrices = [p for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01),
            torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.01),
        ]
        self._rates = (matrix_rate, other_rate)

    def step(self, rate: float) -> None:
        """Apply and clear the gradients at ``rate`` times the base learning rates."""
        for part, base in zip(self._parts, self._rates, strict=True):
            for group in part.param_groups:
                group["lr"] = base * rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, object]:
        """State of both optimisers."""
        return {str(n): part.state_dict() for n, part in enumerate(self._parts)}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """Restore `state_dict`."""
        for n, part in enumerate(self._parts):
            part.load_state_dict(state[str(n)])


def learning_rate(step: int, steps: int) -> float:
    """Share of the base rate at ``step`` in 1..steps: linear warm-up, flat, linear decay to 0."""
    warm_up = min(WARM_UP, WARM_UP_SHARE * steps)
    return min(1.0, step / warm_up, (1.0 - step / steps) / (1.0 - FLAT_UNTIL))
