"""The taming-transformers VQGAN (Esser et al. 2021), WHAM's other image tokenizer; every frame by itself.

Parameters carry the names of the released checkpoints below ``context_encoders.images.vq_model.``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from diagd.errors import UsageError
from diagd.export.tokenizers.base import TokenizerGraphs, build
from diagd.export.tokenizers.shapes import Shapes, count, shape_of

NETWORK = "diagd.export.tokenizers.taming_vq_network"
CHUNK_FRAMES = 8
KEY_PREFIX = "context_encoders.images.vq_model."


@dataclass(frozen=True)
class TamingVqConfig:
    """Sizes of the tokenizer; the defaults are the published f16 model on WHAM's square frames.

    Attributes:
        size: pixel rows and columns.
        stem_channels: channels of the first convolution (``ch``).
        channels: channels of each resolution level, finest first (``ch * ch_mult``).
        res_blocks: residual blocks of an encoder level; a decoder level has one more.
        attention_levels: levels whose blocks are each followed by attention.
        latent_channels: channels between the network and the quantiser's 1x1 convolution (``z_channels``).
        code_width: values per code.
        codes: rows of the codebook.
    """

    size: int = 128
    stem_channels: int = 128
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    res_blocks: int = 2
    attention_levels: tuple[int, ...] = (3,)
    latent_channels: int = 256
    code_width: int = 256
    codes: int = 16384

    def __post_init__(self) -> None:
        if self.size % self.factor:
            raise UsageError(f"frame size {self.size}; it must be a multiple of {self.factor}")

    @property
    def factor(self) -> int:
        """Pixels per token along each axis."""
        return 1 << (len(self.channels) - 1)


def rename(name: str) -> str | None:
    """Parameter name of a key of the checkpoint; tensors of anything else give None."""
    parameter = name.removeprefix(KEY_PREFIX)
    known = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding.")
    return parameter if name != parameter and parameter.startswith(known) else None


def graphs(config: TamingVqConfig) -> TokenizerGraphs:
    """Encoder and decoder of ``config`` for the exporter."""
    side = config.size // config.factor
    return TokenizerGraphs(
        height=config.size,
        width=config.size,
        grid=(side, side),
        codes=config.codes,
        temporal_factor=1,
        chunk_frames=CHUNK_FRAMES,
        build_encoder=partial(build, NETWORK, "Encoder", config),
        build_decoder=partial(build, NETWORK, "Decoder", config),
        rename=rename,
    )


def expected_shapes(config: TamingVqConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of encoder and decoder, by released name without its prefix."""
    return graphs(config).expected_shapes()


def infer_config(shapes: Shapes, size: int = 128) -> TamingVqConfig:
    """Sizes of a checkpoint; the frame size is its ``ddconfig.resolution`` and not stored in a tensor.

    Args:
        shapes: tensor shapes by parameter name (see `rename`).
        size: pixel rows and columns.

    Raises:
        CheckpointError: a tensor that the sizes are read from is missing.
    """
    levels = range(count(shapes, "encoder.down"))
    codes, code_width = shape_of(shapes, "quantize.embedding.weight", 2)
    return TamingVqConfig(
        size=size,
        stem_channels=shape_of(shapes, "encoder.conv_in.weight", 4)[0],
        channels=tuple(shape_of(shapes, f"encoder.down.{n}.block.0.conv1.weight", 4)[0] for n in levels),
        res_blocks=count(shapes, "encoder.down.0.block"),
        attention_levels=tuple(n for n in levels if f"encoder.down.{n}.attn.0.q.weight" in shapes),
        latent_channels=shape_of(shapes, "quant_conv.weight", 4)[1],
        code_width=code_width,
        codes=codes,
    )
