"""The portable form of the step graph: opset 18 alone, for backends without Attention or TensorScatter.

The KV buffers are read and never written: scores over the cached slots and over the step's own rows are two
matrix products under one softmax (TensorRT 10.3 to 10.14 have no in-place cache update, and a scatter would
copy the whole cache). Norms and rotary embedding are spelled out by the tracer, for this opset has neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diagd.export.cache_rows import CacheRows
from diagd.export.step import StepModule
from diagd.export.transformer import FullAttention

HIDDEN_SCORE = -30_000.0
"""Score of an invisible key: finite in float16, and its weight is exactly 0 beside any visible key."""


class PortableAttention(FullAttention):
    """Attention over read-only head-major buffers [1, G, S, D] and the step's own rows.

    Args:
        visible: bool [W, S + W]; slots first, then the rows of the step.
        keys: cached keys of each layer.
        values: cached values of each layer.
        rows: what new rows become in the cache; the step itself attends to what the cache gives back of them.
    """

    def __init__(
        self, visible: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], rows: CacheRows
    ) -> None:
        super().__init__(visible)
        self._visible, self._past = visible, list(zip(keys, values, strict=True))
        self._rows = rows
        self.rows: list[Tensor] = []

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend to both parts; the new rows [1, G, W, D] are kept in ``rows``."""
        past_keys, past_values = (self._rows.load(tensor).squeeze(0) for tensor in self._past[layer])
        new_keys, new_values = self._new(f"key_{layer}", keys), self._new(f"value_{layer}", values)
        width, heads, size = queries.shape
        groups, slots = past_keys.shape[:2]
        grouped = queries.reshape(width, groups, heads // groups, size) * (1 / math.sqrt(size))
        grouped = self._rows.scaled(f"key_{layer}", grouped.permute(1, 2, 0, 3).reshape(groups, -1, size))
        scores = torch.cat([grouped @ past_keys.transpose(1, 2), grouped @ new_keys.transpose(1, 2)], dim=-1)
        weights = torch.softmax(torch.where(self._visible, scores, HIDDEN_SCORE), dim=-1)
        attended = weights[..., :slots] @ past_values + weights[..., slots:] @ new_values
        attended = self._rows.scaled(f"value_{layer}", attended)
        return (
            attended.reshape(groups, heads // groups, width, size)
            .permute(2, 0, 1, 3)
            .reshape(width, heads, size)
        )

    def _new(self, name: str, rows: Tensor) -> Tensor:
        """Rows [W, G, D] of the step leave as the cache stores them; [G, W, D] as it gives them back."""
        stored = self._rows.store(name, rows.transpose(0, 1))
        self.rows.append(stored.unsqueeze(0))
        return self._rows.load(stored)


class PortableStep(StepModule):
    """Step over a cache that its runtime writes.

    Inputs: those of ``ModernStep``. Outputs: logits float32 [W, V], new_key_l and new_value_l [1, G, W, D],
    which belong at slots ``write_index + arange(W)``.
    """

    def forward(
        self,
        token_buffer: Tensor,
        sources: Tensor,
        positions: Tensor,
        slot_position: Tensor,
        write_index: Tensor,
        past: Sequence[Tensor],
        text: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """One step; ``past`` and ``text`` alternate keys and values, layer by layer."""
        config = self.transformer.config
        visible = _visible(slot_position, positions, write_index)
        visible = torch.cat([visible] * (config.heads // config.kv_heads))  # CUDA has no Tile of booleans
        form = PortableAttention(visible, past[0::2], past[1::2], self.kv)
        ids = token_buffer.index_select(0, sources)
        logits = self.transformer.logits(self.transformer.states(ids, positions, form, text)).float()
        return logits, *form.rows, *self.watched.outputs()


def _visible(slot_position: Tensor, positions: Tensor, write_index: Tensor) -> Tensor:
    """Bool [W, S + W]: the slots about to be written hold stale rows, the step's own rows stand for them."""
    slots = torch.arange(slot_position.shape[0], device=positions.device)
    written = write_index + torch.arange(positions.shape[0], device=positions.device)
    stale = (slots >= written[:1]) & (slots <= written[-1:])  # no sum of a size, which the host would do
    own = slot_position.index_select(0, written)
    query = positions.unsqueeze(1)
    return torch.cat([(slot_position <= query) & ~stale, own <= query], dim=1)
