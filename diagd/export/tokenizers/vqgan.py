"""The VQGAN of taming-transformers (Esser et al. 2021): MineWorld's image tokenizer, and WHAM's other one.

Every frame by itself. WHAM's checkpoints have taming's names, MineWorld's those of diffusers' ``VQModel``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from diagd.export.tokenizers.base import Shapes, VqganSizes, count, shape_of

MINEWORLD_PARAMETERS = 146_244_675
"""Of encoder and decoder as released."""

WHAM_PREFIX = "context_encoders.images.vq_model."
_KNOWN = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding.")
_OF_DIFFUSERS = {
    ".resnets.": ".block.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".mid_block.block.0.": ".mid.block_1.",
    ".mid_block.block.1.": ".mid.block_2.",
    ".conv_norm_out.": ".norm_out.",
    ".conv_shortcut.": ".nin_shortcut.",
}


@dataclass(frozen=True)
class VqganConfig(VqganSizes):
    """Sizes of the tokenizer; the defaults are the published f16 model on WHAM's square frames.

    ``code_width``: values per code. ``middle_attention``: between the two blocks in the middle.
    ``diffusers``: its checkpoint has diffusers' names, else taming's.
    """

    height: int = 128
    width: int = 128
    attention_levels: tuple[int, ...] = (3,)
    middle_attention: bool = True
    code_width: int = 256
    codes: int = 16384
    diffusers: bool = False

    network = "diagd.export.tokenizers.vqgan_network"

    @property
    def parameters(self) -> int | None:
        """Known of MineWorld's as released."""
        return MINEWORLD_PARAMETERS if self == MINEWORLD else None

    def rename(self, name: str) -> str | None:
        """See `diffusers_name` and `taming_name`."""
        return diffusers_name(name, len(self.channels)) if self.diffusers else taming_name(name)


MINEWORLD = VqganConfig(
    height=224,
    width=384,
    channels=(128, 256, 256, 512, 768),
    attention_levels=(),
    middle_attention=False,
    latent_channels=64,
    code_width=64,
    codes=8192,
    diffusers=True,
)
"""The release."""


def taming_name(name: str) -> str | None:
    """Parameter name of a key of WHAM's checkpoints; tensors of anything else give None."""
    parameter = name.removeprefix(WHAM_PREFIX)
    return parameter if name != parameter and parameter.startswith(_KNOWN) else None


def diffusers_name(name: str, levels: int) -> str | None:
    """Parameter name of a key of MineWorld's vae.ckpt, or of the copy that its transformers carry.

    ``levels``: resolutions of the network; diffusers counts those of a decoder from the coarsest.
    """

    def level(match: re.Match[str]) -> str:
        number = int(match[2])
        return f".{match[1]}.{levels - 1 - number if match[1] == 'up' else number}."

    parameter = name.removeprefix("tokenizer.").removeprefix("model.")
    parameter = re.sub(r"\.(down|up)_blocks\.(\d+)\.", level, parameter)
    for its, ours in _OF_DIFFUSERS.items():
        parameter = parameter.replace(its, ours)
    return parameter if parameter.startswith(_KNOWN) else None


def infer_config(shapes: Shapes, size: int = 128) -> VqganConfig:
    """Sizes of a checkpoint from shapes by parameter name (`taming_name`); CheckpointError: one is missing.

    The frame size is its ``ddconfig.resolution`` and not stored in a tensor.
    """
    levels = range(count(shapes, "encoder.down"))
    codes, code_width = shape_of(shapes, "quantize.embedding.weight", 2)
    return VqganConfig(
        height=size,
        width=size,
        stem_channels=shape_of(shapes, "encoder.conv_in.weight", 4)[0],
        channels=tuple(shape_of(shapes, f"encoder.down.{n}.block.0.conv1.weight", 4)[0] for n in levels),
        res_blocks=count(shapes, "encoder.down.0.block"),
        attention_levels=tuple(n for n in levels if f"encoder.down.{n}.attn.0.q.weight" in shapes),
        latent_channels=shape_of(shapes, "quant_conv.weight", 4)[1],
        code_width=code_width,
        codes=codes,
    )
