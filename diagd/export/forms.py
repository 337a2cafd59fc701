"""The frontier-step graph: one forward pass over a KV cache, in the forms that backends want.

Prefill, next-token prediction, diagonal steps and verification are this one graph. A form says how attention
meets the cache; everything else is the transformer itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from diagd.bundle.manifest import Form
from diagd.bundle.transformer import TransformerConfig
from diagd.export.tracing import onnx_operator
from diagd.export.transformer import FullAttention, Transformer
from diagd.export.variants import CacheRows, Watched


class Slots(NamedTuple):
    """Where the rows of a step stand: their positions int32 [W] and those of all slots, int32 [S].

    Attributes:
        positions: of the step's rows.
        slot_position: of the slots, those of the step included.
        write_index: int64 [1], slot of the first row.
    """

    positions: Tensor
    slot_position: Tensor
    write_index: Tensor

    @property
    def written(self) -> Tensor:
        """Slots of the step's rows, [W]."""
        return self.write_index + torch.arange(self.positions.shape[0], device=self.positions.device)

    @property
    def visible(self) -> Tensor:
        """Bool [W, S]: which slots each row attends to."""
        return self.slot_position.unsqueeze(0) <= self.positions.unsqueeze(1)


class PrefixAttention:
    """Attention over the bound prefix of sequence-major buffers [T, G, D], rows appended in place.

    The query heads of a KV head are rows of one matrix product, so no KV head is repeated, and K and V are
    read as they lie (ONNX Runtime fuses the transpositions into the products). The cost follows the bound
    length T = live slots + W, not the capacity.
    """

    HIDDEN: Final = -1e30
    """Added to the score of an invisible key: its weight is exactly 0, and a row is never NaN."""

    def __init__(
        self, config: TransformerConfig, slots: Slots, past: Sequence[Tensor], rows: CacheRows
    ) -> None:
        self._bias = torch.where(slots.visible, 0.0, self.HIDDEN).repeat(config.heads // config.kv_heads, 1)
        self._slots, self._past, self._rows = slots.written, past, rows
        self.cache: list[Tensor] = []

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
        keys = self._write(2 * layer, f"key_{layer}", keys)
        values = self._write(2 * layer + 1, f"value_{layer}", values)
        scores = _grouped(queries, keys.shape[1]) @ keys.permute(1, 2, 0) + self._bias
        return _ungrouped(torch.softmax(scores, dim=-1) @ values.permute(1, 0, 2), queries)

    def _write(self, buffer: int, name: str, rows: Tensor) -> Tensor:
        """The buffers stay in floating point: rows that are to be rounded are rounded on their way in."""
        rounded = self._rows.scaled(name, self._rows.load(self._rows.store(name, rows)))
        self.cache.append(self._past[buffer].index_put((self._slots,), rounded))
        return self.cache[-1]


class ModernAttention:
    """TensorScatter-24 into head-major buffers [1, G, S, D], then Attention-24 with a boolean mask.

    TensorRT maps the pair to its in-place KV cache update and fused attention.
    """

    def __init__(
        self, config: TransformerConfig, slots: Slots, past: Sequence[Tensor], rows: CacheRows
    ) -> None:
        del config, rows  # TensorScatter takes floating point only
        self._mask = slots.visible
        self._write_index, self._past = slots.write_index, past
        self.cache: list[Tensor] = []

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotate [W, heads, D] with one RotaryEmbedding-23."""
        heads_first = x.transpose(0, 1).unsqueeze(0)
        rotated = torch.onnx.ops.rotary_embedding(heads_first, cosines.unsqueeze(0), sines.unsqueeze(0))
        return rotated.squeeze(0).transpose(0, 1)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Update the cache, then attend to every visible slot."""
        for buffer, rows in zip(self._past[2 * layer : 2 * layer + 2], (keys, values), strict=True):
            inputs: tuple[Tensor, ...] = (buffer, rows.transpose(0, 1).unsqueeze(0), self._write_index)
            self.cache.append(
                onnx_operator("TensorScatter", inputs, buffer.dtype, buffer.shape, axis=2, mode="linear")
            )
        heads_first = queries.transpose(0, 1).unsqueeze(0)
        inputs = (heads_first, *self.cache[-2:], self._mask)
        scale = 1 / math.sqrt(queries.shape[-1])
        attended = onnx_operator("Attention", inputs, queries.dtype, heads_first.shape, scale=scale)
        return attended.squeeze(0).transpose(0, 1)


class PortableAttention(FullAttention):
    """Attention over read-only head-major buffers [1, G, S, D] and the step's own rows, in opset 18 alone.

    The buffers are never written: scores over the cached slots and over the step's rows are two matrix
    products under one softmax (TensorRT 10.3 to 10.14 have no in-place cache update, and a scatter would copy
    the whole cache). The step attends to what the cache gives back of its rows.
    """

    HIDDEN: Final = -30_000.0
    """Score of an invisible key: finite in float16, and its weight is exactly 0 beside any visible key."""

    def __init__(
        self, config: TransformerConfig, slots: Slots, past: Sequence[Tensor], rows: CacheRows
    ) -> None:
        shared = config.heads // config.kv_heads
        visible = torch.cat([_beside_stale(slots)] * shared)  # CUDA has no Tile of booleans
        super().__init__(visible)
        self._visible, self._past, self._rows = visible, past, rows
        self.cache: list[Tensor] = []

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend to both parts; the new rows [1, G, W, D] go out."""
        past = self._past[2 * layer : 2 * layer + 2]
        past_keys, past_values = (self._rows.load(tensor).squeeze(0) for tensor in past)
        new_keys, new_values = self._new(f"key_{layer}", keys), self._new(f"value_{layer}", values)
        grouped = self._rows.scaled(f"key_{layer}", _grouped(queries, past_keys.shape[0]))
        scores = torch.cat([grouped @ past_keys.transpose(1, 2), grouped @ new_keys.transpose(1, 2)], dim=-1)
        weights = torch.softmax(torch.where(self._visible, scores, self.HIDDEN), dim=-1)
        slots = past_keys.shape[1]
        attended = weights[..., :slots] @ past_values + weights[..., slots:] @ new_values
        return _ungrouped(self._rows.scaled(f"value_{layer}", attended), queries)

    def _new(self, name: str, rows: Tensor) -> Tensor:
        """Rows [W, G, D] of the step leave as the cache stores them; [G, W, D] as it gives them back."""
        stored = self._rows.store(name, rows.transpose(0, 1))
        self.cache.append(stored.unsqueeze(0))
        return self._rows.load(stored)


def _beside_stale(slots: Slots) -> Tensor:
    """Bool [W, S + W]: the slots about to be written hold stale rows, the step's own rows stand for them."""
    positions, slot_position, _ = slots
    index, written = torch.arange(slot_position.shape[0], device=positions.device), slots.written
    stale = (index >= written[:1]) & (index <= written[-1:])  # no sum of a size, which the host would do
    own = slot_position.index_select(0, written)
    return torch.cat([slots.visible & ~stale, own <= positions.unsqueeze(1)], dim=1)


def _grouped(queries: Tensor, groups: int) -> Tensor:
    """Scaled queries [W, H, D] as [G, H / G * W, D]: those of a KV head are rows of one product."""
    width, heads, size = queries.shape
    grouped = queries.reshape(width, groups, heads // groups, size) * (1 / math.sqrt(size))
    return grouped.permute(1, 2, 0, 3).reshape(groups, -1, size)


def _ungrouped(attended: Tensor, queries: Tensor) -> Tensor:
    """The inverse of ``_grouped``, without the scale."""
    width, heads, size = queries.shape
    apart = attended.reshape(attended.shape[0], -1, width, size)
    return apart.permute(2, 0, 1, 3).reshape(width, heads, size)


ATTENTIONS: Final[dict[Form, type[PrefixAttention] | type[ModernAttention] | type[PortableAttention]]] = {
    Form.PREFIX: PrefixAttention,
    Form.MODERN: ModernAttention,
    Form.PORTABLE: PortableAttention,
}


class Step(nn.Module):
    """One step in a form.

    Inputs: token_buffer int32 [N], sources and positions int32 [W], slot_position int32 [S], write_index
    int64 [1], logit_rows int32 [R] where the width is dynamic, past_key_l and past_value_l.
    Outputs: logits float32 [R, V], of all W rows where the width is fixed; then present_key_l and
    present_value_l, or new_key_l and new_value_l [1, G, W, D], which belong at ``write_index + arange(W)``.

    Attributes:
        transformer: the model; matrices of it may be replaced.
        kv: what K/V rows become in the cache.
        watched: values that become further outputs, behind the others.
    """

    def __init__(self, transformer: Transformer, form: Form) -> None:
        super().__init__()
        self.transformer, self.form = transformer, form
        self.kv, self.watched = CacheRows(), Watched()

    def replace_matrices(self, matrices: Mapping[str, nn.Module]) -> None:
        """Put modules in the place of matrices, by name in the graph."""
        for name, module in matrices.items():
            parent, _, leaf = name.rpartition(".")
            owner = self.get_submodule(parent)
            delattr(owner, leaf)
            setattr(owner, leaf, module)

    def forward(
        self,
        token_buffer: Tensor,
        sources: Tensor,
        positions: Tensor,
        slot_position: Tensor,
        write_index: Tensor,
        logit_rows: Tensor | None,
        past: Sequence[Tensor],
        text: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """One step; ``past`` and ``text`` alternate keys and values, layer by layer."""
        slots = Slots(positions, slot_position, write_index)
        attention = ATTENTIONS[self.form](self.transformer.config, slots, past, self.kv)
        states = self.transformer.states(token_buffer.index_select(0, sources), positions, attention, text)
        if logit_rows is not None:
            states = states.index_select(0, logit_rows)
        return self.transformer.logits(states).float(), *attention.cache, *self.watched.outputs()


class TextRows(nn.Module):
    """The text's keys and values of every layer, worked out once for a text."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, text: Tensor) -> tuple[Tensor, ...]:
        """Text float32 [length, width] -> keys and values [G, length, D], alternating by layer."""
        return tuple(self.transformer.text_rows(text.to(self.transformer.embedding.dtype)))
