"""The image tokenizer of MineWorld: a convolutional VQ autoencoder in the layout of diffusers' ``VQModel``.

Sixteen-fold smaller in space, every frame by itself; parameters carry the names of the released vae.ckpt
without its leading ``model.``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from diagd.errors import UsageError
from diagd.export.tokenizers.base import TokenizerGraphs, build
from diagd.export.tokenizers.shapes import Shapes, count, shape_of

NETWORK = "diagd.export.tokenizers.mineworld_vq_network"
CHUNK_FRAMES = 8
PARAMETERS = 146_244_675
"""Of encoder and decoder with the default sizes."""


@dataclass(frozen=True)
class MineworldVqConfig:
    """Sizes of the tokenizer; the defaults are the release.

    Attributes:
        height: pixel rows.
        width: pixel columns.
        channels: channels of each resolution level, finest first.
        res_blocks: residual blocks of an encoder level; a decoder level has one more.
        latent_channels: values per code.
        codes: rows of the codebook.
    """

    height: int = 224
    width: int = 384
    channels: tuple[int, ...] = (128, 256, 256, 512, 768)
    res_blocks: int = 2
    latent_channels: int = 64
    codes: int = 8192

    def __post_init__(self) -> None:
        if self.height % self.factor or self.width % self.factor:
            raise UsageError(
                f"frame height {self.height}, width {self.width}; both must be multiples of {self.factor}"
            )

    @property
    def factor(self) -> int:
        """Pixels per token along each axis."""
        return 1 << (len(self.channels) - 1)


def rename(name: str) -> str | None:
    """Parameter name of a key of vae.ckpt, or of the copy that the transformer checkpoints carry."""
    parameter = name.removeprefix("tokenizer.").removeprefix("model.")
    known = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding.")
    return parameter if parameter.startswith(known) else None


def graphs(config: MineworldVqConfig) -> TokenizerGraphs:
    """Encoder and decoder of ``config`` for the exporter."""
    return TokenizerGraphs(
        height=config.height,
        width=config.width,
        grid=(config.height // config.factor, config.width // config.factor),
        codes=config.codes,
        temporal_factor=1,
        chunk_frames=CHUNK_FRAMES,
        build_encoder=partial(build, NETWORK, "Encoder", config),
        build_decoder=partial(build, NETWORK, "Decoder", config),
        parameters=PARAMETERS if config == MineworldVqConfig() else None,
        rename=rename,
    )


def expected_shapes(config: MineworldVqConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of encoder and decoder, by released name without ``model.``."""
    return graphs(config).expected_shapes()


def infer_config(shapes: Shapes, height: int = 224, width: int = 384) -> MineworldVqConfig:
    """Sizes of a checkpoint; the frame size is not stored in one and has to be given.

    Args:
        shapes: tensor shapes by parameter name (see `rename`).
        height: pixel rows.
        width: pixel columns.

    Raises:
        CheckpointError: a tensor that the sizes are read from is missing.
    """
    levels = range(count(shapes, "encoder.down_blocks"))
    codes, latent_channels = shape_of(shapes, "quantize.embedding.weight", 2)
    return MineworldVqConfig(
        height=height,
        width=width,
        channels=tuple(
            shape_of(shapes, f"encoder.down_blocks.{n}.resnets.0.conv1.weight", 4)[0] for n in levels
        ),
        res_blocks=count(shapes, "encoder.down_blocks.0.resnets"),
        latent_channels=latent_channels,
        codes=codes,
    )
