"""What every video tokenizer offers to the exporter: two graphs and the numbers a bundle records.

The encoder graph maps ``pixels`` uint8 ``[T, H, W, 3]`` (RGB) to ``tokens`` int32 ``[t, h, w]``, the decoder
graph maps them back. Scaling, normalisation, clamping and truncation are inside the graphs.
"""

from __future__ import annotations

import importlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

from diagd.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]
"""Of a checkpoint's tensors, by name."""

WHAM_PREFIX = "context_encoders.images.vq_model."
VQGAN_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding.")


def grid_of(height: int, width: int, factor: int) -> tuple[int, int]:
    """Rows and columns of tokens of ``factor`` x ``factor`` pixels; UsageError where they are not whole."""
    if height % factor or width % factor:
        raise UsageError(f"frame height {height}, width {width}; both must be multiples of {factor}")
    return height // factor, width // factor


@dataclass(frozen=True)
class TokenizerGraphs(ABC):
    """Encoder and decoder of a tokenizer at one frame size; subclasses have what else they are made from.

    Attributes:
        height, width: pixels of a frame.
        network: module of the networks, imported when one is built, for it needs torch; behind a colon is how
            their names begin, which end in ``Encoder`` and ``Decoder``.
        temporal_factor: pixel frames per latent frame. Where it is more than 1 the first frame of every call
            is a latent frame by itself.
        chunk_frames: most pixel frames of one call; longer videos are cut into independent calls of that
            many, which bounds memory.
        cover: the released code scales pictures of another size evenly and keeps their centre; else it
            stretches them.
        released: parameters of both networks, of the sizes that are the defaults, where these are known.

    Raises:
        UsageError: the frame is not made of whole tokens.
    """

    height: int
    width: int

    network: ClassVar[str]
    temporal_factor: ClassVar[int] = 1
    chunk_frames: ClassVar[int] = 8
    cover: ClassVar[bool] = False
    released: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        _ = self.grid  # refuses frames that are not made of whole tokens

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of one latent frame."""

    @property
    @abstractmethod
    def codes(self) -> int:
        """Size of the codebook; tokens are 0 .. codes - 1."""

    def rename(self, name: str) -> str | None:
        """Parameter name of a key of a released checkpoint; None for a tensor that is not used."""
        return name

    def build(self, name: Literal["Encoder", "Decoder"]) -> nn.Module:
        """One of the two networks; it honours ``torch.device("meta")``."""
        module, _, kind = self.network.partition(":")
        made: nn.Module = getattr(importlib.import_module(f"{__package__}.{module}"), kind + name)(self)
        return made

    def modules(self) -> dict[str, nn.Module]:
        """Both networks as ``encoder`` and ``decoder``, without data."""
        import torch

        with torch.device("meta"):
            return {"encoder": self.build("Encoder").to("meta"), "decoder": self.build("Decoder").to("meta")}

    def frames(self, latents: int) -> int:
        """Pixel frames that one call decodes from ``latents`` latent frames."""
        return 1 + (latents - 1) * self.temporal_factor

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of encoder and decoder, by released name; allocates nothing."""
        states = [module.state_dict() for module in self.modules().values()]
        return {name: tuple(tensor.shape) for state in states for name, tensor in state.items()}

    def parameter_count(self) -> int:
        """Parameters of encoder and decoder together; builds them where the number is not known."""
        if self.released and all(getattr(self, field.name) == field.default for field in fields(self)):
            return self.released
        return sum(math.prod(shape) for shape in self.expected_shapes().values())


@dataclass(frozen=True)
class VqganSizes(TokenizerGraphs):
    """The VQGAN that maps frames to latents and back.

    Attributes:
        stem_channels: channels of the first convolution (``ch``).
        channels: channels of each resolution level, finest first (``ch * ch_mult``); all but the last halve
            the size.
        res_blocks: residual blocks of an encoder level; a decoder level has one more.
        attention_levels: levels whose blocks are each followed by attention.
        latent_channels: channels between the network and the quantiser's convolution (``z_channels``).
        finest: pixels along each side of a cell of the finest level.
    """

    stem_channels: int = 128
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    res_blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    latent_channels: int = 256

    finest: ClassVar[int] = 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return grid_of(self.height, self.width, self.finest << (len(self.channels) - 1))


@dataclass(frozen=True)
class VqganConfig(VqganSizes):
    """The VQGAN of taming-transformers (Esser et al. 2021): MineWorld's tokenizer, and WHAM's other one.

    Every frame by itself. The defaults are the published f16 model on WHAM's square frames.

    ``code_width``: values per code. ``middle_attention``: between the two blocks in the middle.
    """

    height: int = 128
    width: int = 128
    attention_levels: tuple[int, ...] = (3,)
    middle_attention: bool = True
    code_width: int = 256
    codes: int = 16384

    network = "vqgan_network"

    def rename(self, name: str) -> str | None:
        """Parameter name of a key of WHAM's checkpoints; tensors of anything else give None."""
        parameter = name.removeprefix(WHAM_PREFIX)
        return parameter if name != parameter and parameter.startswith(VQGAN_PARTS) else None


def loaded(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module, for evaluation, with its own of the tensors; KeyError, RuntimeError: one does not fit."""
    module.load_state_dict({name: tensors[name] for name in module.state_dict()})
    return module.eval()


def shape_of(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    """Shape of a tensor that sizes are read from; CheckpointError: absent, or of another rank."""
    found = shapes.get(name)
    if found is None:
        raise CheckpointError(
            f"the checkpoint has no tensor '{name}', from which sizes are read, and {len(shapes)} others "
            "of the same part; is it a file of this model?"
        )
    if len(found) != rank:
        raise CheckpointError(f"tensor '{name}' has shape {list(found)}; expected {rank} dimensions")
    return tuple(found)


def count(shapes: Shapes, prefix: str) -> int:
    """Number of consecutive indices N = 0, 1, ... for which tensors ``prefix.N.*`` exist."""
    found = {int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
    return next(index for index in range(len(found) + 1) if index not in found)


def infer_vqgan(shapes: Shapes, size: int = 128) -> VqganConfig:
    """Sizes of a checkpoint from shapes by parameter name; CheckpointError: one is missing.

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
