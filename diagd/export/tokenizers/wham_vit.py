"""The image tokenizer of WHAM: a ViT-VQGAN (Yu et al. 2022), every frame by itself.

Frames are normalised as for ImageNet, padded on the right and at the bottom to whole patches, and encoded by
a bidirectional transformer; codes are compared by direction. Parameters carry the names of the released
checkpoints below ``context_encoders.images.``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from diagd.errors import CheckpointError, UsageError
from diagd.export.tokenizers.base import TokenizerGraphs
from diagd.export.tokenizers.blocks import nearest_code
from diagd.export.tokenizers.pixels import constant, images_from_pixels, pixels_from_images
from diagd.export.tokenizers.shapes import Shapes, count, shape_of

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
CHUNK_FRAMES = 8
KEY_PREFIX = "context_encoders.images."


@dataclass(frozen=True)
class WhamVitConfig:
    """Sizes of the tokenizer.

    Frame size, patch and codes are those of the releases. Width, depth, head size and code width are stated
    in each checkpoint only (`infer_config`); their defaults are the base model of the ViT-VQGAN paper.

    Attributes:
        height: pixel rows.
        width: pixel columns.
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


class _Attention(nn.Module):
    def __init__(self, hidden: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.c_attn = nn.Linear(hidden, 3 * hidden, bias=False)
        self.c_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        projected: Tensor = self.c_proj(mixed)
        return projected


class _FeedForward(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(hidden, 4 * hidden, bias=False)
        self.c_proj = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))
        return projected


class _Block(nn.Module):
    def __init__(self, hidden: int, head_size: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden, bias=False)
        self.attn = _Attention(hidden, head_size)
        self.ln_2 = nn.LayerNorm(hidden, bias=False)
        self.mlp = _FeedForward(hidden)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = x + self.attn(self.ln_1(x))
        transformed: Tensor = mixed + self.mlp(self.ln_2(mixed))
        return transformed


class _Transformer(nn.Module):
    """A value per patch to another: ``[T, patches, inputs]`` to ``[T, patches, outputs]``."""

    def __init__(self, config: WhamVitConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj1 = nn.Linear(inputs, config.hidden)
        self.pos_embeds = nn.Embedding(math.prod(config.grid), config.hidden)
        self.vit = nn.Sequential(*(_Block(config.hidden, config.head_size) for _ in range(config.layers)))
        self.output_ln = nn.LayerNorm(config.hidden)
        self.output_proj = nn.Linear(config.hidden, outputs)

    def forward(self, patches: Tensor) -> Tensor:
        hidden = self.vit(self.proj1(patches) + self.pos_embeds.weight)
        outputs: Tensor = self.output_proj(self.output_ln(hidden))
        return outputs


class _Quantiser(nn.Module):
    """Unit-length codes."""

    def __init__(self, config: WhamVitConfig) -> None:
        super().__init__()
        self._embedding = nn.Embedding(config.codes, config.code_width)

    @property
    def codebook(self) -> Tensor:
        return functional.normalize(self._embedding.weight, dim=-1)


class Encoder(nn.Module):
    """Pixels to tokens."""

    def __init__(self, config: WhamVitConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Transformer(config, config.patch_values, config.code_width)
        self.vq_vae = _Quantiser(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels uint8 ``[T, H, W, 3]`` to tokens int32 ``[T, h, w]``."""
        images = images_from_pixels(pixels, self.encoder.proj1.weight.dtype) / 255
        images = (images - _colours(MEAN, images)) / _colours(DEVIATION, images)
        latents = functional.normalize(self.encoder(self._patches(images)), dim=-1)
        tokens = nearest_code(latents, self.vq_vae.codebook)
        return tokens.reshape(-1, *self.config.grid)

    def _patches(self, images: Tensor) -> Tensor:
        """Cut ``[T, 3, H, W]`` into ``[T, patches, 3 * patch * patch]``; zeros fill the last patches up."""
        patch, (rows, columns) = self.config.patch, self.config.grid
        right, bottom = columns * patch - self.config.width, rows * patch - self.config.height
        images = functional.pad(images, (0, right, 0, bottom))
        cut = images.reshape(-1, 3, rows, patch, columns, patch)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class Decoder(nn.Module):
    """Tokens to pixels."""

    def __init__(self, config: WhamVitConfig) -> None:
        super().__init__()
        self.config = config
        self.vq_vae = _Quantiser(config)
        self.decoder = _Transformer(config, config.code_width, config.patch_values)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int32 ``[T, h, w]`` to pixels uint8 ``[T, H, W, 3]``."""
        codes = functional.embedding(tokens.flatten(1), self.vq_vae.codebook)
        images = self._images(self.decoder(codes))
        images = images * _colours(DEVIATION, images) + _colours(MEAN, images)
        return pixels_from_images(images.clamp(0, 1) * 255)

    def _images(self, patches: Tensor) -> Tensor:
        """Put ``[T, patches, 3 * patch * patch]`` together as ``[T, 3, H, W]``, cropping the padding."""
        patch = self.config.patch
        cut = patches.reshape(-1, *self.config.grid, 3, patch, patch)
        images = cut.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return images[:, :, : self.config.height, : self.config.width]


def _colours(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return constant(values, like).reshape(3, 1, 1)


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
        temporal_factor=1,
        chunk_frames=CHUNK_FRAMES,
        build_encoder=lambda: Encoder(config),
        build_decoder=lambda: Decoder(config),
        rename=rename,
    )


def expected_shapes(config: WhamVitConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of encoder and decoder, by released name without ``context_encoders.images.``."""
    return graphs(config).expected_shapes()


def infer_config(shapes: Shapes, height: int = 180, width: int = 300, head_size: int = 64) -> WhamVitConfig:
    """Sizes of a checkpoint; frame size and head size are stated in its ``model_spec``, not in tensors.

    Args:
        shapes: tensor shapes by parameter name (see `rename`).
        height: pixel rows.
        width: pixel columns.
        head_size: width of an attention head.

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
