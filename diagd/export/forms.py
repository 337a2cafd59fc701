"""How attention meets the KV cache in a step, in the forms that backends want."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Final, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from diagd.export.tracing import Functions, cast, moved_axes, onnx_operator
from diagd.export.transformer import AttentionForm, FullAttention, Heads, Part


class CacheRows(nn.Module):
    """What K/V rows become on their way into the cache and out of it: themselves."""

    change = False
    """Whether anything is made of them, or noted."""

    def store(self, name: str, rows: Tensor) -> Tensor:
        """What the buffer ``name``, such as ``key_0``, takes."""
        return rows

    def load(self, stored: Tensor) -> Tensor:
        """What attention reads of a buffer; the factors that ``scaled`` multiplies are left out."""
        return stored

    def scaled(self, name: str, x: Tensor) -> Tensor:
        """``x`` [..., D] times the factors of a buffer's channels."""
        return x


class Bound(NamedTuple):
    """What the attention of a step is bound to.

    In graphs of several streams [W] is [B, W] and [S] is [B, S], or [T, B] in the prefix form.

    Attributes:
        shared: query heads of a KV head.
        positions: int32 [W], of the step's rows.
        slot_position: int32 [S], of the slots, those of the step included.
        write_index: int64 [B], slot of the first row; in the prefix form [B, W], of every row.
        past: buffers of keys and values, alternating by layer.
        rows: what K/V rows become in them.
        functions: of the graph.
    """

    shared: int
    positions: Tensor
    slot_position: Tensor
    write_index: Tensor
    past: Sequence[Tensor]
    rows: CacheRows
    functions: Functions


class FunctionForm(AttentionForm):
    """A form whose parts are functions of the graph, where there are kernels for them."""

    LABEL: ClassVar = ""
    """Ahead of the names of functions."""

    KERNELS: ClassVar[frozenset[str] | None] = None
    """Parts, beside attention, that there are kernels for; None: all."""

    def __init__(self, bound: Bound) -> None:
        self._inputs, self._write_index = (bound.positions, bound.slot_position), bound.write_index
        self._past, self._functions = bound.past, bound.functions
        self._dtype = bound.past[0].dtype
        self.cache: list[Tensor] = []

    @override
    def part(
        self,
        name: str,
        body: Part,
        inputs: Sequence[Tensor],
        shapes: Sequence[Sequence[int | torch.SymInt]],
        **attributes: float,
    ) -> tuple[Tensor, ...]:
        if self.KERNELS is not None and name not in self.KERNELS:
            return body(*inputs)
        outputs = [(self._dtype, shape) for shape in shapes]
        return self._functions.call(self.LABEL + name, body, inputs, outputs, **attributes)

    def cached(
        self, layer: int, name: str, body: Part, heads: Heads, fed: Sequence[Tensor], *further: Tensor
    ) -> Tensor:
        """Attention as one function: of positions, what ``heads`` takes, K and V, and what else it takes."""
        past = self._past[2 * layer : 2 * layer + 2]
        outputs = [(fed[0].shape[0], heads.config.query_width), *(buffer.shape for buffer in past)]
        attended, *cache = self._functions.call(
            name,
            body,
            (*self._inputs, *fed, *past, *further),
            [(self._dtype, shape) for shape in outputs],
            epsilon=heads.config.norm_epsilon,
        )
        self.cache += cache
        return attended


class PrefixAttention(FunctionForm):
    """Attention over the bound prefix of buffers [T, B, G, D], a slot of all streams after the other.

    The query heads of a KV head are rows of one matrix product, so no KV head is repeated, and K and V are
    read as they lie (ONNX Runtime fuses the transpositions into the products). The cost follows the bound
    length T, that of the longest stream, not the capacity. All of it from a layer's first product to its next
    one is a function of the graph, which ``native`` has a kernel for.
    """

    HIDDEN: Final = -1e30
    """Added to the score of an invisible key: its weight is exactly 0, and a row is never NaN."""

    LABEL, KERNELS = "Bound", frozenset({"SwiGLU", "RMSNormAdd"})

    LARGE = 1 << 20
    """Elements from which on a matrix comes from memory each time: a kernel of ours waits less for it."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self._rows = bound.rows

    @override
    def product(self, x: Tensor, matrix: Tensor | nn.Module) -> Tensor:
        def body(x: Tensor, matrix: Tensor) -> tuple[Tensor]:
            return (x @ matrix,)

        if isinstance(matrix, nn.Module) or matrix.numel() < self.LARGE:
            return super().product(x, matrix)
        outputs = [(x.dtype, (x.shape[0], matrix.shape[1]))]
        (found,) = self._functions.call(f"{self.LABEL}Product", body, (x, matrix), outputs)
        return found

    @override
    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotate [B * W, heads, D] with one RotaryEmbedding-23."""
        count, heads, size = x.shape
        rows = x.reshape(1, count, heads * size)
        rotated = torch.onnx.ops.rotary_embedding(
            rows, cosines.unsqueeze(0), sines.unsqueeze(0), num_heads=heads
        )
        return rotated.reshape(count, heads, size)

    @override
    def attention(self, layer: int, heads: Heads, inputs: Sequence[Tensor]) -> Tensor:
        """Write the new rows, then attend to the whole bound prefix."""
        if self._rows.change:
            queries, *new = heads(self.rotate, *inputs)
            rounded = map(self._rounded, (f"key_{layer}", f"value_{layer}"), new)
            heads, inputs = heads.bare, [torch.cat([queries, *rounded], dim=-2).flatten(-2)]

        def body(positions: Tensor, slot_position: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            *fed, keys, values, written = inputs
            rows = heads(self.rotate, *fed)
            return _prefix_attention(positions, slot_position, *rows, keys, values, written)

        return self.cached(layer, f"{self.LABEL}{heads.name}", body, heads, inputs, self._write_index)

    def _rounded(self, name: str, rows: Tensor) -> Tensor:
        """The buffers stay in floating point: rows that are to be rounded are rounded on their way in."""
        return self._rows.scaled(name, self._rows.load(self._rows.store(name, rows)))


class ModernAttention(FunctionForm):
    """TensorScatter-24 into head-major buffers [B, G, S, D], then Attention-24 with a mask.

    TensorRT maps the pair to its in-place KV cache update and fused attention. The query heads of a KV head
    are rows of one head: ONNX Runtime's CUDA provider would copy K and V to every query head, over the whole
    capacity. The mask is added, and made once: of one that is boolean the provider makes that in each layer.
    What stands between two products is a function of the graph, which ``native`` has kernels for; that of
    attention reads positions, from which the mask is made.
    """

    HIDDEN: Final = -30_000.0
    """As in ``PortableAttention``."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)  # rows stay as they are: TensorScatter takes floating point only
        self._streams, self._shared = len(bound.write_index), bound.shared
        self._rows = self._shared * bound.positions.shape[-1]
        lead = () if bound.positions.dim() == 1 else (self._streams, 1)
        mask = self._dtype, (*lead, self._rows, bound.slot_position.shape[-1])
        (self._mask,) = bound.functions.call("CachedMask", self._masked, self._inputs, [mask])

    @override
    def attention(self, layer: int, heads: Heads, inputs: Sequence[Tensor]) -> Tensor:
        """Update the cache, then attend to every visible slot."""

        def body(*inputs: Tensor) -> tuple[Tensor, ...]:
            _, _, *fed, keys, values, mask, index = inputs
            queries, *new = heads(self.rotate, *fed)
            keys, values = map(partial(_scattered, index), (keys, values), new)
            return self._attended(self._folded(queries), keys, values, mask), keys, values

        further = self._mask, self._write_index
        return self.cached(layer, f"Cached{heads.name}", body, heads, inputs, *further)

    @override
    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotate [W, heads, D] with one RotaryEmbedding-23."""
        heads_first = x.transpose(0, 1).unsqueeze(0)
        rotated = torch.onnx.ops.rotary_embedding(heads_first, cosines.unsqueeze(0), sines.unsqueeze(0))
        return rotated.squeeze(0).transpose(0, 1)

    def _masked(self, positions: Tensor, slot_position: Tensor) -> tuple[Tensor]:
        visible = slot_position.unsqueeze(-2) <= positions.unsqueeze(-1)
        visible = torch.cat([visible] * self._shared, dim=-2)
        mask = cast(torch.where(visible, 0.0, self.HIDDEN), self._dtype)
        return (mask if positions.dim() == 1 else mask.unsqueeze(1),)

    def _folded(self, queries: Tensor) -> Tensor:
        heads_first = _heads_first(queries, self._streams)
        if self._shared == 1:
            return heads_first
        groups, size = heads_first.shape[1] // self._shared, queries.shape[-1]
        return heads_first.reshape(self._streams, groups, -1, size)

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        streams, groups, _, size = queries.shape
        inputs, scale = (queries, keys, values, mask), 1 / math.sqrt(size)
        attended = onnx_operator("Attention", inputs, queries.dtype, queries.shape, scale=scale)
        if self._shared > 1:
            attended = attended.reshape(streams, groups * self._shared, -1, size)
        if streams == 1:
            return attended.squeeze(0).transpose(0, 1).flatten(-2)
        return attended.transpose(1, 2).flatten(0, 1).flatten(-2)


class PortableAttention(FullAttention):
    """Attention over read-only head-major buffers [B, G, S, D] and the step's own rows, in opset 18 alone.

    The buffers are never written: scores over the cached slots and over the step's rows are two matrix
    products under one softmax (TensorRT 10.3 to 10.14 have no in-place cache update, and a scatter would copy
    the whole cache). The step attends to what the cache gives back of its rows.
    """

    HIDDEN: Final = -30_000.0
    """Score of an invisible key: finite in float16, and its weight is exactly 0 beside any visible key."""

    def __init__(self, bound: Bound) -> None:
        self._streams = len(bound.write_index)
        visible = torch.cat([_beside_stale(bound)] * bound.shared, dim=-2)  # CUDA has no Tile of booleans
        super().__init__(visible)
        self._visible = visible if visible.dim() == 2 else visible.unsqueeze(1)
        self._past, self._rows = bound.past, bound.rows
        self.cache: list[Tensor] = []

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend to both parts; the new rows [B, G, W, D] go out."""
        past = self._past[2 * layer : 2 * layer + 2]
        is_one, loaded = self._streams == 1, map(self._rows.load, past)
        past_keys, past_values = (rows.squeeze(0) if is_one else rows for rows in loaded)
        new_keys, new_values = self._new(f"key_{layer}", keys), self._new(f"value_{layer}", values)
        groups, slots = past_keys.shape[-3:-1]
        grid = (-1,) if self._streams == 1 else (self._streams, -1)
        grouped = self._rows.scaled(f"key_{layer}", _grouped(queries, grid, groups))
        seen = [_products(grouped, keys.transpose(-1, -2)) for keys in (past_keys, new_keys)]
        scores = torch.where(self._visible, torch.cat(seen, dim=-1), self.HIDDEN)
        weights = torch.softmax(scores, dim=-1)
        seen_values = _products(weights[..., :slots], past_values)
        attended = seen_values + _products(weights[..., slots:], new_values)
        attended = self._rows.scaled(f"value_{layer}", attended)
        return _ungrouped(attended, grid, queries.shape[1])

    def _new(self, name: str, rows: Tensor) -> Tensor:
        """Rows [B * W, G, D] leave as the cache stores them; [..., G, W, D] as it gives them back."""
        apart: Tensor = rows if self._streams == 1 else rows.unflatten(0, (self._streams, -1))
        stored = self._rows.store(name, apart.transpose(-2, -3))
        self.cache.append(stored if stored.dim() == 4 else stored.unsqueeze(0))
        return self._rows.load(stored)


def _prefix_attention(
    positions: Tensor,
    slot_position: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    written: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What queries [B * W, H, D] find, [B * W, H * D], and buffers [T, B, G, D] with rows [B * W, G, D]."""
    grid = streams, width = positions.shape
    heads, groups = queries.shape[1], past_keys.shape[2]
    visible = slot_position.t().unsqueeze(1) <= positions.unsqueeze(2)
    bias = torch.where(visible, 0.0, PrefixAttention.HIDDEN).repeat(1, heads // groups, 1).unsqueeze(1)
    stream = torch.arange(streams, device=positions.device).unsqueeze(1).expand(streams, width)
    places = torch.stack([written, stream], dim=-1).flatten(0, 1)
    keys, values = (
        onnx_operator("ScatterND", (past, places, rows), past.dtype, past.shape)
        for past, rows in ((past_keys, keys), (past_values, values))
    )
    scores = _products(_grouped(queries, grid, groups), _transposed(keys, (1, 2, 3, 0))) + bias
    attended = _products(torch.softmax(scores, dim=-1), _transposed(values, (1, 2, 0, 3)))
    return _ungrouped(attended, grid, heads).flatten(-2), keys, values


def _products(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` of equal leading axes: the exporter takes long to find that symbols of sizes are equal."""
    return onnx_operator("MatMul", (x, y), x.dtype, (*x.shape[:-1], y.shape[-1]))


def _transposed(x: Tensor, axes: Sequence[int]) -> Tensor:
    """``x.permute(axes)``, without strides of symbols, which take the exporter as long."""
    return onnx_operator("Transpose", (x,), x.dtype, [x.shape[axis] for axis in axes], perm=list(axes))


def _scattered(index: Tensor, buffer: Tensor, rows: Tensor) -> Tensor:
    """A buffer [B, G, S, D] with rows [B * W, G, D] from the slots ``index`` [B] on."""
    inputs = (buffer, _heads_first(rows, len(index)), index)
    return onnx_operator("TensorScatter", inputs, buffer.dtype, buffer.shape, axis=2, mode="linear")


def _heads_first(rows: Tensor, streams: int) -> Tensor:
    """Rows [B * W, heads, D] as [B, heads, W, D]."""
    if streams == 1:  # without a Reshape, whose sizes a host would work out
        return rows.transpose(0, 1).unsqueeze(0)
    apart: Tensor = rows.unflatten(0, (streams, -1))
    return apart.transpose(1, 2)


def _beside_stale(bound: Bound) -> Tensor:
    """Bool [..., W, S + W]: slots about to be written hold stale rows, the step's own rows stand for them."""
    positions, slot_position, is_one = bound.positions, bound.slot_position, bound.positions.dim() == 1
    rows, index = (torch.arange(x.shape[-1], device=x.device) for x in (positions, slot_position))
    written = (bound.write_index if is_one else bound.write_index.unsqueeze(1)) + rows
    first, last = written[..., :1], written[..., -1:]
    stale = (index >= first).logical_and(index <= last)  # no sum of a size, which the host would do
    own = slot_position.index_select(0, written) if is_one else slot_position.gather(1, written)
    cached, seen = (x.unsqueeze(-2) <= positions.unsqueeze(-1) for x in (slot_position, own))
    return torch.cat([cached.logical_and(~stale.unsqueeze(-2)), seen], dim=-1)


def _grouped(queries: Tensor, grid: Sequence[int], groups: int) -> Tensor:
    """Scaled queries of a grid [..., W], [N, H, D], as [..., G, H / G * W, D].

    Those of a KV head are rows of one product. Sizes that a Reshape can work out are left to it.
    """
    heads, size = queries.shape[-2:]
    apart = queries.reshape(*grid, groups, heads // groups, size) * (1 / math.sqrt(size))
    return _transposed(apart, moved_axes(apart.dim(), -4, -2)).reshape(*grid[:-1], groups, -1, size)


def _ungrouped(attended: Tensor, grid: Sequence[int], heads: int) -> Tensor:
    """The inverse of ``_grouped``, for ``heads`` heads."""
    groups, _, size = attended.shape[-3:]
    apart = attended.reshape(*grid[:-1], groups, heads // groups, grid[-1], size)
    return _transposed(apart, moved_axes(apart.dim(), -2, -4)).reshape(-1, heads, size)
