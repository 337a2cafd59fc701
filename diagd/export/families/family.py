"""What a model family states: everything in which its models differ, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.actions import ActionCodec
from diagd.bundle.manifest import DefaultSchedule, SamplingRules
from diagd.bundle.transformer import Shape, TransformerConfig, parameter_shapes
from diagd.export.tokenizers.base import TokenizerGraphs

if TYPE_CHECKING:
    from diagd.export.checkpoints import Checkpoint
    from diagd.export.weights import WeightSource


@dataclass(frozen=True)
class TensorRule:
    """How a tensor of the transformer is made from those of a checkpoint.

    Attributes:
        target: canonical name.
        sources: names and shapes in the checkpoint.
        transpose: the sources are [out, in] matrices, to lie side by side as [in, out].
        fill: value and shape of a tensor that has no source.
    """

    target: str
    sources: tuple[tuple[str, Shape], ...] = ()
    transpose: bool = False
    fill: tuple[float, Shape] | None = None

    def weight(self, checkpoint: Checkpoint) -> WeightSource:
        """The canonical tensor, read from the checkpoint."""
        from diagd.export.weights import constant, copied, transposed

        if self.fill:
            value, shape = self.fill
            return constant(np.full(shape, value, np.float32))
        handles = [checkpoint[name] for name, _ in self.sources]
        return transposed(handles) if self.transpose else copied(handles[0])

    def release(self, tensor: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        """The tensors of a checkpoint that ``weight`` makes the canonical one from."""
        if not self.transpose:
            return {name: tensor for name, _ in self.sources[:1]}
        ends = np.cumsum([shape[0] for _, shape in self.sources])[:-1]
        parts = np.split(tensor, ends, axis=1)
        return {
            name: np.ascontiguousarray(part.T) for (name, _), part in zip(self.sources, parts, strict=True)
        }


@dataclass(frozen=True)
class Family:
    """One exportable model.

    Attributes:
        name: what users type, such as ``mineworld-300m``.
        family: the group it belongs to.
        title: one line for listings.
        transformer: dimensions and options.
        rules: how its weights are found in a released checkpoint.
        prefixes: stripped from checkpoint names, first match; other names are not the transformer's.
        ignored: endings of names that are left out.
        sampling, schedule, actions, frames_per_second: what the manifest says.
        licence: of the weights.
        origin: where the weights come from, and whether they can still be had.
        tokenizer: pixel graphs, and how their tensors are found in a checkpoint.
        default_checkpoint, default_tokenizer: used where the caller names none.
    """

    name: str
    family: str
    title: str
    transformer: TransformerConfig
    rules: tuple[TensorRule, ...]
    prefixes: tuple[str, ...]
    sampling: SamplingRules
    schedule: DefaultSchedule
    frames_per_second: float
    licence: str
    origin: str
    actions: ActionCodec | None = None
    tokenizer: TokenizerGraphs | None = None
    default_checkpoint: str | None = None
    default_tokenizer: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def expected(self) -> dict[str, Shape]:
        """Names (prefix stripped) and shapes of the checkpoint's tensors."""
        return {name: shape for rule in self.rules for name, shape in rule.sources}

    def rename(self, name: str) -> str | None:
        """The transformer's name of a checkpoint tensor, or None for a tensor of something else."""
        for prefix in () if name.endswith(self.ignored) else self.prefixes:
            if name.startswith(prefix):
                return name[len(prefix) :]
        return None

    def weights(self, checkpoint: Checkpoint) -> Mapping[str, WeightSource]:
        """Canonical tensors of a checkpoint whose names were mapped by ``rename`` and checked."""
        return {rule.target: rule.weight(checkpoint) for rule in self.rules}


def llama_rules(config: TransformerConfig) -> tuple[TensorRule, ...]:
    """Rules for checkpoints with the tensor names of Hugging Face's Llama."""
    hidden, inner = config.hidden, config.feed_forward
    query, key = config.heads * config.head_size, config.kv_heads * config.head_size
    rules = [
        TensorRule("embedding", (("model.embed_tokens.weight", (config.vocabulary, hidden)),)),
        TensorRule("norm.weight", (("model.norm.weight", (hidden,)),)),
        TensorRule("head", (("lm_head.weight", (config.output_vocabulary, hidden)),), transpose=True),
    ]
    for layer in range(config.layers):
        source, target = f"model.layers.{layer}.", f"layers.{layer}."
        projections = (("q_proj", query), ("k_proj", key), ("v_proj", key))
        fused = tuple((f"{source}self_attn.{name}.weight", (width, hidden)) for name, width in projections)
        gated = tuple((f"{source}mlp.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up"))
        output = ((f"{source}self_attn.o_proj.weight", (hidden, query)),)
        rules += [
            TensorRule(f"{target}attention_norm.weight", ((f"{source}input_layernorm.weight", (hidden,)),)),
            TensorRule(f"{target}attention.qkv", fused, transpose=True),
            TensorRule(f"{target}attention.out", output, transpose=True),
            TensorRule(
                f"{target}feed_forward_norm.weight",
                ((f"{source}post_attention_layernorm.weight", (hidden,)),),
            ),
            TensorRule(f"{target}feed_forward.gate_up", gated, transpose=True),
            TensorRule(
                f"{target}feed_forward.down",
                ((f"{source}mlp.down_proj.weight", (hidden, inner)),),
                transpose=True,
            ),
        ]
    return tuple(rules)


def identity_rules(config: TransformerConfig) -> tuple[TensorRule, ...]:
    """Rules for checkpoints under the transformer's own names, stored as its graphs read them."""
    return tuple(TensorRule(name, ((name, shape),)) for name, shape in parameter_shapes(config).items())
