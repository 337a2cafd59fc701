"""PyTorch runtimes that ours is measured against: the published form and an optimised one.

Both decode one stream greedily from the canonical weights and a step table, with no bookkeeping in Python
beyond the loop over steps, so that only the form of the computation is compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from diagd.bundle.transformer import NormKind, TransformerConfig
from diagd.errors import UsageError
from diagd.schedule import NO_SINK, Block

VOID = torch.iinfo(torch.int64).max
Layer = dict[str, Tensor]
Ids = NDArray[np.int64]


class TorchForm(ABC):
    """The network and greedy decoding; a subclass says how weights are laid out and how a step attends.

    Args:
        weights: state dict of a ``Transformer`` as NumPy arrays; matrices [in, out].
        config: its configuration.
        dtype: float32 or bfloat16, of weights, cache and activations.
        positions: slots of the cache; None: a full context of ``config``.
        device: where everything lies.

    Raises:
        UsageError: the model has parts that the baselines are not written for.
    """

    def __init__(
        self,
        weights: Mapping[str, NDArray[Any]],
        config: TransformerConfig,
        dtype: torch.dtype = torch.float32,
        positions: int | None = None,
        device: str = "cpu",
    ) -> None:
        check_config(config)
        self.config, self.dtype, self.device = config, dtype, device
        self.positions = positions or config.context_length
        self.embedding, self.norm = self._tensor(weights["embedding"]), self._tensor(weights["norm.weight"])
        self.head = self._matrix(weights["head"])
        self.layers = [self._layer(weights, f"layers.{n}.") for n in range(config.layers)]
        assert config.rotary is not None
        angles = torch.from_numpy(config.rotary.angles(config.layout, self.positions)).unsqueeze(1)
        self.cosines, self.sines = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
        self.keys, self.values = self._empty_cache()

    def run(self, table: Block, live_slots: int, tokens: Ids | None = None) -> Ids:
        """``prefill`` and ``decode``."""
        self.prefill(live_slots)
        return self.decode(table, tokens)

    @abstractmethod
    def prefill(self, live_slots: int) -> None:
        """Empty the cache and fill positions 0..live_slots-1 with random rows, the same for every form."""

    def decode(self, table: Block, tokens: Ids | None = None, widths: Sequence[int] = ()) -> Ids:
        """Every step of ``table``.

        Args:
            table: the steps.
            tokens: [stream], the known tokens by position; None: random ones.
            widths: ascending; a step is filled up to the first that holds it by repeating its last row, which
                caches the same row again where the cache is indexed by position. For graphs, of which there
                is one a width. None: as wide as it is.

        Returns:
            [stream], with the decoded cells filled in.
        """
        if tokens is None:
            size = int(max(table.sources.max(), table.sinks.max())) + 1
            tokens = np.random.default_rng(0).integers(0, self.config.output_vocabulary, size)
        stream = torch.tensor(tokens, device=self.device)
        with torch.inference_mode():
            for sources, positions, seeds, rows, sinks in self._steps(table, widths):
                logits = self._forward(stream[sources], positions, seeds)
                stream[sinks] = logits[rows].argmax(dim=-1)
        return stream.cpu().numpy()

    def _steps(self, table: Block, widths: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
        """Sources, positions and seeds of the fed rows; decoded rows and their sinks; uploaded at once."""
        steps = [step_arrays(table, step, widths) for step in range(table.steps)]
        kinds = zip(*steps, strict=True)
        return zip(
            *(
                torch.from_numpy(np.concatenate(kind)).to(self.device).split([len(array) for array in kind])
                for kind in kinds
            ),
            strict=True,
        )

    def _forward(self, ids: Tensor, positions: Tensor, is_seed: Tensor) -> Tensor:
        """Logits [width, output_vocabulary]."""
        x = functional.embedding(ids, self.embedding)
        self._begin(positions, is_seed)
        for number, layer in enumerate(self.layers):
            queries, keys, values = self._projected(layer, self._normal(x, layer["attention_norm"]))
            if self.config.qk_norm:
                queries = self._normal(queries, layer["query_norm"])
                keys = self._normal(keys, layer["key_norm"])
            queries, keys = self._rotated(queries, positions), self._rotated(keys, positions)
            x = x + self._attend(number, queries, keys, values).flatten(1) @ layer["out"]
            gate, up = self._gate_up(layer, self._normal(x, layer["feed_forward_norm"]))
            x = x + (functional.silu(gate) * up) @ layer["down"]
        return self._normal(x, self.norm) @ self.head

    def _normal(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.config.norm_epsilon)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of x [width, heads, head_size], rotate-half layout."""
        cosines, sines = self.cosines[positions], self.sines[positions]
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.tensor(array).to(self.device, self.dtype)

    def _matrix(self, matrix: NDArray[Any]) -> Tensor:
        """A matrix [in, out] that lies in memory as [out, in], like the weight of ``nn.Linear``."""
        return self._tensor(matrix).T.contiguous().T

    def _layer(self, weights: Mapping[str, NDArray[Any]], prefix: str) -> Layer:
        names = ["attention_norm", "feed_forward_norm"]
        if self.config.qk_norm:
            names += ["attention.query_norm", "attention.key_norm"]
        norms = {name.split(".")[-1]: weights[f"{prefix}{name}.weight"] for name in names}
        matrices = {
            name.split(".")[1]: weights[prefix + name]
            for name in ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down")
        }
        return {name: self._tensor(norm) for name, norm in norms.items()} | self._matrices(matrices)

    def _random_rows(self, layer: int, count: int) -> Tensor:
        """Keys and values of a layer for slots filled beforehand, [2, count, kv_heads, head_size]."""
        shape = (2, count, self.config.kv_heads, self.config.head_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(layer)).to(self.device, self.dtype)

    @abstractmethod
    def _matrices(self, matrices: dict[str, NDArray[Any]]) -> Layer:
        """The matrices of a layer as this form multiplies by them."""

    @abstractmethod
    def _empty_cache(self) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _begin(self, positions: Tensor, is_seed: Tensor) -> None:
        """Place and mask of a step's rows."""

    @abstractmethod
    def _projected(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [width, heads, head_size], keys and values [width, kv_heads, head_size]."""

    @abstractmethod
    def _attend(self, number: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Cache the new rows; [width, heads, head_size]."""

    @abstractmethod
    def _gate_up(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]: ...


class PublishedForm(TorchForm):
    """The form of the released runtimes: a static cache indexed by position, attended to as a whole.

    Separate projections, KV heads repeated for every query head, boolean causal mask rows, the math kernel of
    scaled dot-product attention. Unwritten slots below a query are visible zeros.
    """

    def _matrices(self, matrices: dict[str, NDArray[Any]]) -> Layer:
        config = self.config
        edges = np.cumsum([config.heads * config.head_size, config.kv_heads * config.head_size])
        parts = dict(zip("qkv", np.split(matrices["qkv"], edges, axis=1), strict=True))
        parts["gate"], parts["up"] = np.split(matrices["gate_up"], 2, axis=1)
        parts |= {"out": matrices["out"], "down": matrices["down"]}
        return {name: self._matrix(part) for name, part in parts.items()}

    def _empty_cache(self) -> tuple[Tensor, Tensor]:
        self.causal = torch.ones(self.positions, self.positions, dtype=torch.bool, device=self.device).tril_()
        shape = (self.config.layers, self.positions, self.config.kv_heads, self.config.head_size)
        return self._tensor(np.zeros(shape)), self._tensor(np.zeros(shape))

    def prefill(self, live_slots: int) -> None:
        """Random rows at positions 0..live_slots-1, zeros elsewhere."""
        self.keys.zero_()
        self.values.zero_()
        for layer in range(self.config.layers):
            self.keys[layer, :live_slots], self.values[layer, :live_slots] = self._random_rows(
                layer, live_slots
            )

    def _begin(self, positions: Tensor, is_seed: Tensor) -> None:
        self.rows, self.mask = positions, self.causal[positions]

    def _projected(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ((x @ layer[name]).unflatten(-1, (-1, self.config.head_size)) for name in "qkv")
        return q, k, v

    def _attend(self, number: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.keys[number, self.rows], self.values[number, self.rows] = keys, values
        repeats = self.config.heads // self.config.kv_heads
        keys = self.keys[number].repeat_interleave(repeats, dim=1)
        values = self.values[number].repeat_interleave(repeats, dim=1)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (queries, keys, values))
        with sdpa_kernel(SDPBackend.MATH):
            attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return attended[0].transpose(0, 1)

    def _gate_up(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ layer["gate"], x @ layer["up"]


class OptimisedForm(TorchForm):
    """What plain PyTorch can do: the live prefix only, fused projections, query heads grouped into the GEMM.

    Rows are cached in decode order; the mask is additive, from the position of each slot; seeds are void once
    their step is over.
    """

    def _matrix(self, matrix: NDArray[Any]) -> Tensor:
        """The faster memory layout of the two: [in, out] in float32, [out, in] in bfloat16."""
        return self._tensor(matrix) if self.dtype is torch.float32 else super()._matrix(matrix)

    def _matrices(self, matrices: dict[str, NDArray[Any]]) -> Layer:
        return {name: self._matrix(matrix) for name, matrix in matrices.items()}

    def _empty_cache(self) -> tuple[Tensor, Tensor]:
        slots = self.positions + self.config.layout.frame_length
        self.slot_position = torch.full((slots,), VOID)
        shape = (self.config.layers, self.config.kv_heads, slots, self.config.head_size)
        return self._tensor(np.zeros(shape)), self._tensor(np.zeros(shape))

    def prefill(self, live_slots: int) -> None:
        """Random rows for positions 0..live_slots-1 in as many slots."""
        self.fresh, self.seeds = slice(0, live_slots), torch.empty(0, dtype=torch.int64)
        self.slot_position[:live_slots] = torch.arange(live_slots)
        for layer in range(self.config.layers):
            rows = self._random_rows(layer, live_slots).transpose(1, 2)
            self.keys[layer, :, :live_slots], self.values[layer, :, :live_slots] = rows

    def _begin(self, positions: Tensor, is_seed: Tensor) -> None:
        self.slot_position[self.seeds] = VOID
        self.fresh = slice(self.fresh.stop, self.fresh.stop + len(positions))
        self.seeds = self.fresh.start + is_seed.nonzero().flatten()
        self.slot_position[self.fresh] = positions
        hidden = self.slot_position[: self.fresh.stop] > positions[:, None]
        self.mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)

    def _projected(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        heads = (x @ layer["qkv"]).unflatten(-1, (-1, config.head_size))
        q, k, v = heads.split([config.heads, config.kv_heads, config.kv_heads], dim=1)
        return q, k, v

    def _attend(self, number: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        live, groups, width = self.fresh.stop, self.config.kv_heads, len(queries)
        self.keys[number, :, self.fresh] = keys.transpose(0, 1)
        self.values[number, :, self.fresh] = values.transpose(0, 1)
        scaled = (queries * self.config.head_size**-0.5).unflatten(1, (groups, -1))
        grouped = scaled.permute(1, 2, 0, 3).flatten(1, 2)
        scores = grouped @ self.keys[number, :, :live].transpose(1, 2)
        masked = scores.unflatten(1, (-1, width)) + self.mask
        attended = masked.softmax(dim=-1).flatten(1, 2) @ self.values[number, :, :live]
        output: Tensor = attended.unflatten(1, (-1, width)).permute(2, 0, 1, 3).flatten(1, 2)
        return output

    def _gate_up(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (x @ layer["gate_up"]).chunk(2, dim=-1)
        return gate, up


def step_arrays(table: Block, step: int, widths: Sequence[int]) -> tuple[NDArray[Any], ...]:
    """What ``TorchForm`` needs of one step: sources, positions, seeds, and decoded rows with their sinks."""
    part = slice(int(table.offsets[step]), int(table.offsets[step + 1]))
    count = part.stop - part.start
    padded = np.arange(next((width for width in widths if width >= count), count)).clip(max=count - 1)
    sources, positions = (array[part][padded].astype(np.int64) for array in (table.sources, table.positions))
    rows = np.flatnonzero(table.sinks[part] != NO_SINK)
    return sources, positions, sources != positions, rows, table.sinks[part][rows].astype(np.int64)


def check_config(config: TransformerConfig) -> None:
    """Refuse a model that needs more than Llama blocks, with or without a norm of queries and keys.

    Raises:
        UsageError: it does; the message names what.
    """
    unknown = {
        "no rotary embedding": config.rotary is None,
        "absolute positions": config.absolute or config.slot_embedding,
        "layer norms": config.norm is not NormKind.RMS,
        "biases": config.bias,
        "feed-forward layers without a gate": not config.gated,
        "a tied head": config.tied_head,
        "text": config.text is not None,
    }
    if found := [name for name, there in unknown.items() if there]:
        raise UsageError(
            f"the PyTorch baselines are written for Llama blocks; this model has {', '.join(found)}"
        )
