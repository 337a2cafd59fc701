"""The image tokenizer of WHAM: a ViT-VQGAN (Yu et al. 2022), every frame by itself.

Frames are normalised as for ImageNet, padded on the right and at the bottom to whole patches, and encoded by
a bidirectional transformer; codes are compared by direction. Parameters carry the names of the released
checkpoints below ``context_encoders.images.``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diagd.errors import CheckpointError, UsageError
from diagd.export.tokenizers.base import Shapes, TokenizerGraphs, count, shape_of

NETWORK = "diagd.export.tokenizers.wham_vit_network"
CHUNK_FRAMES = 8
KEY_PREFIX = "context_encoders.images."
PARAMETERS = 171_774_796
"""Of encoder and decoder with the default sizes."""


@dataclass(frozen=True)
class WhamVitConfig:
    """Sizes of the tokenizer.

    Frame size, patch and codes are those of the releases. Width, depth, head size and code width are stated
    in each checkpoint only (`infer_config`); their defaults are the base model of the ViT-VQGAN paper.

    Attributes:
        height, width: pixels of a frame.
        patch: pixels of a patch along each axis.
        hidden: width of the transformers.
        layers: transformer blocks of the encoder, and of the decoder.
        head_size: width of an attention head.
        code_width: values per code.
        codes: rows of the codebook.
    """

    height: int = 180
    width: int = 300
    patch: int = 10
    hidden: int = 768
    layers: int = 12
    head_size: int = 64
    code_width: int = 32
    codes: int = 16384

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


def rename(name: str) -> str | None:
    """Parameter name of a key of the checkpoint; the discriminators and masks of training give None."""
    parameter = name.removeprefix(KEY_PREFIX)
    known = parameter.startswith(("encoder.", "decoder.", "vq_vae._embedding."))
    return parameter if name != parameter and known and not parameter.endswith(".attn_mask") else None


def graphs(config: WhamVitConfig) -> TokenizerGraphs:
    """Encoder and decoder of ``config`` for the exporter."""
    return TokenizerGraphs(
        height=config.height,
        width=config.width,
        grid=config.grid,
        codes=config.codes,
        chunk_frames=CHUNK_FRAMES,
        network=NETWORK,
        config=config,
        parameters=PARAMETERS if config == WhamVitConfig() else None,
        rename=rename,
    )


def infer_config(shapes: Shapes, height: int = 180, width: int = 300, head_size: int = 64) -> WhamVitConfig:
    """Sizes of a checkpoint; frame size and head size are stated in its ``model_spec``, not in tensors.

    ``shapes`` are by parameter name (see `rename`).

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
