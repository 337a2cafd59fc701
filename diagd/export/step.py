"""The frontier-step graph: one forward pass over a KV cache, in the forms that backends want.

Prefill, next-token prediction, diagonal steps and verification are this one graph. A form says how attention
meets the cache and what the head gives back; everything else is the transformer itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diagd.export.cache_rows import CacheRows
from diagd.export.tracing import onnx_operator
from diagd.export.transformer import Transformer
from diagd.export.watched import Watched

HIDDEN_SCORE = -1e30
"""Added to the score of an invisible key: its weight is exactly 0, and a row is never NaN."""


class PrefixAttention:
    """Attention over the bound prefix of sequence-major buffers [T, G, D], rows appended in place.

    The query heads of a KV head are rows of one matrix product, so no KV head is repeated, and K and V are
    read as they lie (ONNX Runtime fuses the transpositions into the products). The cost follows the bound
    length T = live slots + W, not the capacity.
    """

    def __init__(
        self,
        slots: Tensor,
        bias: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        rows: CacheRows,
    ) -> None:
        self._slots, self._bias, self._rows = slots, bias, rows
        self.keys, self.values = list(keys), list(values)

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotate [W, heads, D] with one RotaryEmbedding-23."""
        width, heads, size = x.shape
        rows = x.reshape(1, width, heads * size)
        rotated = torch.onnx.ops.rotary_embedding(
            rows, cosines.unsqueeze(0), sines.unsqueeze(0), num_heads=heads
        )
        return rotated.reshape(width, heads, size)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write the new rows, then attend to the whole bound prefix."""
        self.keys[layer] = self._write(self.keys[layer], f"key_{layer}", keys)
        self.values[layer] = self._write(self.values[layer], f"value_{layer}", values)
        width, heads, size = queries.shape
        groups = keys.shape[1]
        grouped = queries.reshape(width, groups, heads // groups, size) * (1 / math.sqrt(size))
        grouped = grouped.permute(1, 2, 0, 3).reshape(groups, -1, size)
        scores = grouped @ self.keys[layer].permute(1, 2, 0) + self._bias
        attended = torch.softmax(scores, dim=-1) @ self.values[layer].permute(1, 0, 2)
        return (
            attended.reshape(groups, heads // groups, width, size)
            .permute(2, 0, 1, 3)
            .reshape(width, heads, size)
        )

    def _write(self, buffer: Tensor, name: str, rows: Tensor) -> Tensor:
        """The buffers stay in floating point: rows that are to be rounded are rounded on their way in."""
        rounded = self._rows.scaled(name, self._rows.load(self._rows.store(name, rows)))
        return buffer.index_put((self._slots,), rounded)


class ModernAttention:
    """TensorScatter-24 into head-major buffers [1, G, S, D], then Attention-24 with a boolean mask.

    TensorRT maps the pair to its in-place KV cache update and fused attention.
    """

    def __init__(
        self, write_index: Tensor, mask: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        self._write_index, self._mask = write_index, mask
        self.keys, self.values = list(keys), list(values)

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotate [W, heads, D] with one RotaryEmbedding-23."""
        heads_first = x.transpose(0, 1).unsqueeze(0)
        rotated = torch.onnx.ops.rotary_embedding(heads_first, cosines.unsqueeze(0), sines.unsqueeze(0))
        return rotated.squeeze(0).transpose(0, 1)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Update the cache, then attend to every visible slot."""
        self.keys[layer] = self._scatter(self.keys[layer], keys)
        self.values[layer] = self._scatter(self.values[layer], values)
        heads_first = queries.transpose(0, 1).unsqueeze(0)
        inputs = (heads_first, self.keys[layer], self.values[layer], self._mask)
        scale = 1 / math.sqrt(queries.shape[-1])
        attended = onnx_operator("Attention", inputs, queries.dtype, heads_first.shape, scale=scale)
        return attended.squeeze(0).transpose(0, 1)

    def _scatter(self, buffer: Tensor, rows: Tensor) -> Tensor:
        inputs = (buffer, rows.transpose(0, 1).unsqueeze(0), self._write_index)
        return onnx_operator("TensorScatter", inputs, buffer.dtype, buffer.shape, axis=2, mode="linear")


class StepModule(nn.Module):
    """What steps of every form have.

    Attributes:
        transformer: the model; matrices of it may be replaced.
        kv: what K/V rows become in the cache.
        watched: values that become further outputs, behind the others.
    """

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer, self.kv, self.watched = transformer, CacheRows(), Watched()

    def replace_matrices(self, matrices: Mapping[str, nn.Module]) -> None:
        """Put modules in the place of matrices, by name in the graph."""
        for name, module in matrices.items():
            parent, _, leaf = name.rpartition(".")
            owner = self.get_submodule(parent)
            delattr(owner, leaf)
            setattr(owner, leaf, module)


class PrefixStep(StepModule):
    """Step with dynamic width and bound length; logits of chosen rows, sampling on the host.

    Inputs: token_buffer int32 [N], sources int32 [W], positions int32 [W], slot_position int32 [T],
    write_index int64 [1], logit_rows int32 [R], past_key_l and past_value_l [T, G, D].
    Outputs: logits float32 [R, V], present_key_l, present_value_l.
    """

    def forward(
        self,
        token_buffer: Tensor,
        sources: Tensor,
        positions: Tensor,
        slot_position: Tensor,
        write_index: Tensor,
        logit_rows: Tensor,
        past: Sequence[Tensor],
        text: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """One step; ``past`` and ``text`` alternate keys and values, layer by layer."""
        config = self.transformer.config
        slots = write_index + torch.arange(sources.shape[0], device=sources.device)
        visible = slot_position.unsqueeze(0) <= positions.unsqueeze(1)
        bias = torch.where(visible, 0.0, HIDDEN_SCORE).repeat(config.heads // config.kv_heads, 1)
        form = PrefixAttention(slots, bias, past[0::2], past[1::2], self.kv)
        ids = token_buffer.index_select(0, sources)
        states = self.transformer.states(ids, positions, form, text).index_select(0, logit_rows)
        logits = self.transformer.logits(states).float()
        return logits, *_interleave(form.keys, form.values), *self.watched.outputs()


class ModernStep(StepModule):
    """Step of fixed width and capacity.

    Inputs: token_buffer int32 [N], sources int32 [W], positions int32 [W], slot_position int32 [S],
    write_index int64 [1], past_key_l and past_value_l [1, G, S, D].
    Outputs: logits float32 [W, V], present_key_l, present_value_l.
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
        mask = slot_position.unsqueeze(0) <= positions.unsqueeze(1)
        form = ModernAttention(write_index, mask, past[0::2], past[1::2])
        ids = token_buffer.index_select(0, sources)
        logits = self.transformer.logits(self.transformer.states(ids, positions, form, text)).float()
        return logits, *_interleave(form.keys, form.values), *self.watched.outputs()


class TextRows(nn.Module):
    """The text's keys and values of every layer, worked out once for a text."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, text: Tensor) -> tuple[Tensor, ...]:
        """Text float32 [length, width] -> keys and values [G, length, D], alternating by layer."""
        return tuple(self.transformer.text_rows(text.to(self.transformer.embedding.dtype)))


def _interleave(keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for pair in zip(keys, values, strict=True) for tensor in pair]
