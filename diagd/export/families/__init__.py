"""What a model family states, everything in which its models differ, as data; and models by name.

A family's module is imported when one of its models is asked for.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.actions import ActionCodec
from diagd.bundle.manifest import ClipRules, MediaMark, SamplingRules
from diagd.bundle.transformer import Shape, TransformerConfig, parameter_shapes
from diagd.errors import UsageError, unknown
from diagd.export.tokenizers.base import TokenizerGraphs

if TYPE_CHECKING:
    from diagd.export.checkpoints import Checkpoint
    from diagd.export.weights import WeightSource

MODULES = {
    **dict.fromkeys(("cosmos-4b", "cosmos-12b", "cosmos-5b-video2world", "cosmos-13b-video2world"), "cosmos"),
    **dict.fromkeys(("wham-200m", "wham-1.6b"), "wham"),
    **dict.fromkeys(("mineworld-300m", "mineworld-700m", "mineworld-700m-32f"), "mineworld"),
    **dict.fromkeys(("mineworld-1200m", "mineworld-1200m-32f"), "mineworld"),
    **dict.fromkeys(("crafter-3m", "doom-3m", "world"), "world"),
}
"""Module of this package that holds each model, as ``build(name, checkpoint)``."""

TOLD = (
    *("name", "family", "transformer", "sampling", "order", "decoder"),
    *("actions", "clips", "mark", "frames_per_second", "licence"),
)
"""What the manifest of a bundle says of a family."""

Names = Mapping[str, "str | tuple[str, ...] | None"]


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
        name, family: what users type, such as ``mineworld-300m``, and the group it belongs to; they and the
            other fields of ``TOLD`` are what the manifest says.
        rules: how its weights are found in a released checkpoint.
        prefixes: stripped from checkpoint names, first match; other names are not the transformer's.
        ignored: endings of names that are left out.
        origin: where the weights come from, and whether they can still be had.
        tokenizer: pixel graphs, and how their tensors are found in a checkpoint.
        default_checkpoint, default_tokenizer: used where the caller names none.
        prompts: folder of pictures that worlds start from.
    """

    name: str
    family: str
    transformer: TransformerConfig
    rules: tuple[TensorRule, ...]
    prefixes: tuple[str, ...]
    sampling: SamplingRules
    order: str
    frames_per_second: float
    licence: str
    origin: str
    actions: ActionCodec | None = None
    clips: ClipRules = field(default_factory=ClipRules)
    mark: MediaMark | None = None
    tokenizer: TokenizerGraphs | None = None
    decoder: Literal["order", "jacobi"] = "order"
    default_checkpoint: str | None = None
    default_tokenizer: str | None = None
    prompts: Path | None = None
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


LLAMA: Names = {
    "embedding": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "layers.*.attention.qkv": (
        "model.layers.*.self_attn.q_proj.weight",
        "model.layers.*.self_attn.k_proj.weight",
        "model.layers.*.self_attn.v_proj.weight",
    ),
    "layers.*.attention.out": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.feed_forward_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.feed_forward.gate_up": (
        "model.layers.*.mlp.gate_proj.weight",
        "model.layers.*.mlp.up_proj.weight",
    ),
    "layers.*.feed_forward.down": "model.layers.*.mlp.down_proj.weight",
}
"""The tensor names of Hugging Face's Llama, see ``named_rules``."""


def named_rules(config: TransformerConfig, names: Names) -> tuple[TensorRule, ...]:
    """Rules for checkpoints that store every matrix as [out, in] and leave fused ones apart.

    Args:
        config: dimensions of the transformer; all shapes follow from them.
        names: canonical name to the checkpoint's, several where the canonical tensor is fused of them, ``*``
            for the number of a layer. None: the model has no such tensor; norms scale by 1 and shift by 0.
    """
    rules = []
    for target, shape in parameter_shapes(config).items():
        _, number, part = re.fullmatch(r"(layers\.(\d+)\.)?(.*)", target).groups("")  # type: ignore[union-attr]
        found = names[f"layers.*.{part}" if number else part]
        if found is None:
            rules.append(TensorRule(target, fill=(float(target.endswith("weight")), shape)))
            continue
        sources = [name.replace("*", number) for name in ([found] if isinstance(found, str) else found)]
        matrix = len(shape) == 2 and not part.endswith("embedding")  # embeddings are read by row
        ends = [shape[-1] // len(sources)] * len(sources)
        if len(sources) == 3:  # q, k and v; others are equal parts
            ends = [config.query_width, config.key_width, config.key_width]
        shapes = [(end, shape[0]) for end in ends] if matrix else [shape]
        rules.append(TensorRule(target, tuple(zip(sources, shapes, strict=True)), transpose=matrix))
    return tuple(rules)


def identity_rules(config: TransformerConfig) -> tuple[TensorRule, ...]:
    """Rules for checkpoints under the transformer's own names, stored as its graphs read them."""
    return tuple(TensorRule(name, ((name, shape),)) for name, shape in parameter_shapes(config).items())


def find(
    name: str,
    checkpoint: str | None = None,
    size: tuple[int, int] | None = None,
    tokenizer: str | None = None,
) -> Family:
    """The model called ``name``.

    Args:
        name: as users type it.
        checkpoint: where its weights are, for families whose dimensions are read from there.
        size: height and width of its pictures, for families that were post-trained at several.
        tokenizer: where its tokenizer is, if not there, for families whose sizes are read from it.

    Raises:
        UsageError: there is none; the nearest name and all names are listed. Or the checkpoint is empty.
    """
    if name not in MODULES:
        error = unknown("model", name, MODULES)
        if Path(name).name != name:
            raise UsageError(f"{error}; {name} is a path: give it as --checkpoint, and --model a name")
        raise error
    if checkpoint is not None and not checkpoint.strip():
        raise UsageError(f"the checkpoint of {name} is an empty path; is a variable of the shell not set?")
    module = importlib.import_module(f"diagd.export.families.{MODULES[name]}")
    read = signature(module.build).parameters
    if size is not None and "size" not in read:
        raise UsageError(f"size {size[0]}x{size[1]}: {name} has pictures of one size; leave it out")
    told = {"size": size, "tokenizer": tokenizer}
    given = {key: value for key, value in told.items() if value is not None and key in read}
    family: Family = module.build(name, checkpoint, **given)
    return family


def listing() -> list[dict[str, object]]:
    """One row for each model that needs no folder: size, grid, context, licence, origin."""
    rows = []
    for name in MODULES:
        try:
            model = find(name)
        except UsageError:  # its folder is not here
            continue
        layout, config = model.transformer.layout, model.transformer
        rows.append(
            {
                "model": name,
                "parameters": config.parameters,
                "grid": f"{layout.rows} x {layout.columns}",
                "context": f"{config.context_frames} frames",
                "licence": model.licence,
                "weights": model.origin,
            }
        )
    return rows
