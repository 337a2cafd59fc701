"""WHAM (Microsoft, "World and Human Action Model"): games at 10 Hz, 10 steps of 18 x 30 image tokens.

A GPT-2 with learned positions. The releases differ in details that are read off the checkpoint: block
version, biases, image tokenizer.

That is a ViT-VQGAN (Yu et al. 2022), every frame by itself: frames are normalised as for ImageNet, padded on
the right and at the bottom to whole patches, and encoded by a bidirectional transformer; codes are compared
by direction. Parameters carry the names of the released checkpoints below ``context_encoders.images.``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from diagd.bundle.actions import ActionCodec, Button, EdgesSlot, OnlyPressedSlot
from diagd.bundle.manifest import ClipRules, IdRange, MediaMark, SamplingRules
from diagd.bundle.transformer import NormKind, TransformerConfig
from diagd.errors import CheckpointError, UsageError
from diagd.export.families import Family, TensorRule, named_rules
from diagd.export.tokenizers.base import Shapes, TokenizerGraphs, VqganConfig, count, infer_vqgan, shape_of
from diagd.schedule import StreamLayout

if TYPE_CHECKING:
    from diagd.export.checkpoints import Checkpoint


KEY_PREFIX = "context_encoders.images."
ACTION_TOKENS = 16
ACTION_IDS = 68
PREFIX = "predictor.gpt_model."

LAYER_NORMS: dict[str, str | None] = {
    f"layers.*.{ours}_norm.{part}": f"transformer.h.*.{its}.{part}"
    for ours, its in (("attention", "ln_1"), ("feed_forward", "ln_2"))
    for part in ("weight", "bias")
}

NAMES: dict[str, str | None] = {
    "embedding": "transformer.wte.weight",
    "position_embedding": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    **LAYER_NORMS,
    **{
        f"layers.*.{ours}{suffix}": f"transformer.h.*.{its}.{part}"
        for ours, its in (
            ("attention.qkv", "attn.c_attn"),
            ("attention.out", "attn.c_proj"),
            ("feed_forward.up", "mlp.c_fc"),
            ("feed_forward.down", "mlp.c_proj"),
        )
        for suffix, part in (("", "weight"), ("_bias", "bias"))
    },
}

_BUTTONS: Final = 12
_STICKS: Final = 4
_HALF: Final = (0.05, 0.25, 0.5, 0.75, 0.95, 1.05)
_EDGES: Final = (*(-edge for edge in reversed(_HALF)), *_HALF)

HEADS = {2304: 18, 1024: 16, 1792: 14, 3072: 24}
"""Attention heads by width, which no tensor tells."""


@dataclass(frozen=True)
class WhamVitConfig(TokenizerGraphs):
    """Sizes of the tokenizer.

    Frame size, patch and codes are those of the releases. Width, depth, head size and code width are stated
    in each checkpoint only (`infer_config`); their defaults are the base model of the ViT-VQGAN paper.

    ``patch``: pixels of a patch along each axis. ``layers``: of the encoder, and of the decoder.
    ``code_width``: values per code.
    """

    height: int = 180
    width: int = 300
    patch: int = 10
    hidden: int = 768
    layers: int = 12
    head_size: int = 64
    code_width: int = 32
    codes: int = 16384

    network = "wham_vit_network"
    released = 171_774_796

    def __post_init__(self) -> None:
        if self.hidden % self.head_size:
            raise UsageError(
                f"head size {self.head_size} does not divide the tokenizer's width {self.hidden}; "
                "give the head_size of the checkpoint's model_spec"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, the last ones perhaps padded."""
        return -(-self.height // self.patch), -(-self.width // self.patch)

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return 3 * self.patch**2

    def rename(self, name: str) -> str | None:
        """Parameter name of a key of the checkpoint; the discriminators and masks of training give None."""
        parameter = name.removeprefix(KEY_PREFIX)
        known = parameter.startswith(("encoder.", "decoder.", "vq_vae._embedding."))
        return parameter if name != parameter and known and not parameter.endswith(".attn_mask") else None


def infer_config(shapes: Shapes, height: int = 180, width: int = 300, head_size: int = 64) -> WhamVitConfig:
    """Sizes of a checkpoint; frame size and head size are stated in its ``model_spec``, not in tensors.

    ``shapes`` are by parameter name (see `WhamVitConfig.rename`).

    Raises:
        CheckpointError: a tensor is missing, or the number of positions does not fit the frame size.
    """
    hidden, patch_values = shape_of(shapes, "encoder.proj1.weight", 2)
    codes, code_width = shape_of(shapes, "vq_vae._embedding.weight", 2)
    positions = shape_of(shapes, "encoder.pos_embeds.weight", 2)[0]
    config = WhamVitConfig(
        height=height,
        width=width,
        patch=math.isqrt(patch_values // 3),
        hidden=hidden,
        layers=count(shapes, "encoder.vit"),
        head_size=head_size,
        code_width=code_width,
        codes=codes,
    )
    if config.patch_values != patch_values or math.prod(config.grid) != positions:
        raise CheckpointError(
            f"the tokenizer has {positions} positions and patches of {patch_values} values; frames of height "
            f"{height} and width {width} give {math.prod(config.grid)} patches of {config.patch_values}; "
            "give the frame size of the checkpoint's model_spec (image_size_per_y_axis and _x_axis)"
        )
    return config


class _Size(NamedTuple):
    file: str
    layers: int
    hidden: int


SIZES = {
    "wham-200m": _Size("WHAM_200M.ckpt", 16, 1024),
    "wham-1.6b": _Size("WHAM_1.6B_v1.ckpt", 24, 2304),
}


@dataclass(frozen=True)
class Variant:
    """What a checkpoint decides; with ``norm_weights`` norms inside the layers have any (block version 1)."""

    config: TransformerConfig
    norm_weights: bool
    tokenizer: TokenizerGraphs | None


def build(name: str, checkpoint: str | None = None, tokenizer: str | None = None) -> Family:
    """One of the releases; without a checkpoint, with block version 1, biases and the ViT tokenizer.

    Raises:
        CheckpointError: the checkpoint is of another size or its tensors contradict each other.
    """
    size = SIZES[name]
    if checkpoint is None:
        pixels = WhamVitConfig()
        frame = pixels.grid[0] * pixels.grid[1] + ACTION_TOKENS
        config = transformer_config(
            grid=pixels.grid,
            codes=pixels.codes,
            frames=5560 // frame,
            hidden=size.hidden,
            layers=size.layers,
            heads=HEADS[size.hidden],
            bias=True,
        )
        return family(name, Variant(config, norm_weights=True, tokenizer=pixels))
    from diagd.export.checkpoints import open_checkpoint

    opened = open_checkpoint(checkpoint)
    variant = infer_variant(opened, open_checkpoint(tokenizer) if tokenizer else opened)
    if variant.config.hidden != size.hidden:
        raise CheckpointError(
            f"{checkpoint} is {variant.config.hidden} wide, {name} is {size.hidden}; "
            f"choose another --model (known: {', '.join(SIZES)})"
        )
    return family(name, variant, checkpoint)


def family(name: str, variant: Variant, checkpoint: str | None = None) -> Family:
    """A WHAM of any dimensions; small ones serve tests."""
    config = variant.config
    codes = config.vocabulary - ACTION_IDS
    file = SIZES[name].file if name in SIZES else "*.ckpt"
    return Family(
        name=name,
        family="wham",
        transformer=config,
        rules=wham_rules(config, norm_weights=variant.norm_weights),
        prefixes=(PREFIX,),
        ignored=("lm_head.weight", ".attn.bias"),  # the head is the embedding; masks are buffers
        sampling=SamplingRules(
            ranges=(IdRange(low=0, high=codes), IdRange(cell=0, low=1, high=codes)),
            keep_crossing=False,
            minimum_temperature=0.1,
            temperature=0.9,
        ),
        order="k=1 serial",
        frames_per_second=10.0,
        licence="Microsoft Research License, research only",
        origin=f"microsoft/wham on the Hugging Face Hub: give --checkpoint hf://microsoft/wham/models/{file}",
        actions=wham_actions(codes),
        clips=ClipRules(frames=max(1, config.context_frames - 1), followed=True),
        mark=MediaMark(
            text="Generated by WHAM", program="Generated by WHAM (World Human-Action Model)", required=True
        ),
        tokenizer=variant.tokenizer,
        default_checkpoint=checkpoint,
    )


def transformer_config(
    *, grid: tuple[int, int], codes: int, frames: int, hidden: int, layers: int, heads: int, bias: bool
) -> TransformerConfig:
    """All dimensions, from those that the others follow from."""
    return TransformerConfig(
        layout=StreamLayout(*grid, after=ACTION_TOKENS),
        context_frames=frames,
        vocabulary=codes + ACTION_IDS,
        output_vocabulary=codes + ACTION_IDS,
        hidden=hidden,
        feed_forward=4 * hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        rotary=None,
        position_embedding=True,
        norm=NormKind.LAYER,
        bias=bias,
        gated=False,
        tied_head=True,
    )


def infer_variant(checkpoint: Checkpoint, images: Checkpoint) -> Variant:
    """Read a checkpoint's dimensions off its tensor shapes, and those of the tokenizer off ``images``.

    Raises:
        CheckpointError: a tensor is missing, the width is unknown, or vocabulary or positions do not fit the
            image tokenizer.
    """
    shapes: Shapes = {
        name.removeprefix(PREFIX): handle.shape
        for name, handle in checkpoint.items()
        if name.startswith(PREFIX)
    }
    vocabulary, hidden = shape_of(shapes, "transformer.wte.weight", 2)
    positions = shape_of(shapes, "transformer.wpe.weight", 2)[0]
    if hidden not in HEADS:
        raise CheckpointError(
            f"{checkpoint.source} is {hidden} wide, for which the number of attention heads is not known "
            f"(known widths: {', '.join(map(str, HEADS))})"
        )
    _check_head(checkpoint)
    tokenizer = infer_tokenizer(images) or WhamVitConfig(codes=vocabulary - ACTION_IDS)
    grid, codes = tokenizer.grid, tokenizer.codes
    frame = grid[0] * grid[1] + ACTION_TOKENS
    if positions % frame or vocabulary != codes + ACTION_IDS:
        raise CheckpointError(
            f"{checkpoint.source}: {positions} positions and {vocabulary} ids do not fit images of "
            f"{grid[0]} x {grid[1]} tokens out of {codes}; expected a multiple of {frame} positions and "
            f"{codes + ACTION_IDS} ids"
        )
    config = transformer_config(
        grid=grid,
        codes=codes,
        frames=positions // frame,
        hidden=hidden,
        layers=count(shapes, "transformer.h"),
        heads=HEADS[hidden],
        bias="transformer.h.0.attn.c_attn.bias" in shapes,
    )
    return Variant(config, "transformer.h.0.ln_1.weight" in shapes, tokenizer)


def _check_head(checkpoint: Checkpoint) -> None:
    """CheckpointError where the head is not the embedding, in whose place nobody reads it."""
    head, embedding = (checkpoint.get(PREFIX + name) for name in ("lm_head.weight", "transformer.wte.weight"))
    if head is None or embedding is None or head == embedding:
        return
    if not np.array_equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{checkpoint.source} has a head (lm_head.weight) other than its embedding (wte.weight), "
            "expected one matrix for both; use a checkpoint that ties them, as the releases do"
        )


def infer_tokenizer(checkpoint: Checkpoint) -> TokenizerGraphs | None:
    """The image tokenizer that a checkpoint holds, if it holds one.

    Frame and head sizes are in the hyperparameters; where those are missing, they are as documented.
    """
    from diagd.export.checkpoints import select

    settings = dict(_leaves(checkpoint.metadata))

    def setting(name: str, default: int) -> int:
        value = settings.get(name)
        return value if isinstance(value, int) else default

    shapes: Shapes = {name: h.shape for name, h in select(checkpoint, WhamVitConfig().rename).items()}
    if "encoder.proj1.weight" in shapes:
        height, width = setting("image_size_per_y_axis", 180), setting("image_size_per_x_axis", 300)
        return infer_config(shapes, height, width, setting("head_size", 64))
    shapes = {name: h.shape for name, h in select(checkpoint, VqganConfig().rename).items()}
    if "quantize.embedding.weight" in shapes:
        return infer_vqgan(shapes, setting("resolution", 128))
    return None


def _leaves(value: object) -> Iterator[tuple[str, object]]:
    """All (key, value) pairs of nested plain data."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key), item
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def wham_rules(config: TransformerConfig, *, norm_weights: bool) -> tuple[TensorRule, ...]:
    """Rules for the names of the released checkpoints, ``predictor.gpt_model.`` stripped."""
    own = {} if norm_weights else dict.fromkeys(LAYER_NORMS)
    return named_rules(config, NAMES | own)


def wham_actions(codes: int = 16384) -> ActionCodec:
    """Codec of a WHAM model whose image tokens are 0 .. codes - 1.

    Buttons are ``button_0`` .. ``button_11`` in the order of the model's action vector; the field ``sticks``
    holds its four stick components in [-1, 1]. The release does not say which control each one is.
    """
    sticks = codes + 2 * _BUTTONS
    bins = len(_EDGES) - 1
    return ActionCodec(
        slots=(
            *(
                OnlyPressedSlot(
                    buttons=(Button(name=f"button_{index}", token=codes + 2 * index + 1),),
                    none=codes + 2 * index,
                )
                for index in range(_BUTTONS)
            ),
            *(
                EdgesSlot(field="sticks", component=index, edges=_EDGES, first=sticks + bins * index)
                for index in range(_STICKS)
            ),
        )
    )
