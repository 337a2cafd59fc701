"""The network of WHAM's ViT-VQGAN."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

from diagd.export.families.wham import WhamVitConfig
from diagd.export.tokenizers import vqgan_network as vqgan

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


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


class _Block(nn.Module):
    def __init__(self, hidden: int, head_size: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden, bias=False)
        self.attn = _Attention(hidden, head_size)
        self.ln_2 = nn.LayerNorm(hidden, bias=False)
        fc, proj = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)
        self.mlp = nn.Sequential(OrderedDict(c_fc=fc, gelu=nn.GELU("tanh"), c_proj=proj))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = x + self.attn(self.ln_1(x))
        transformed: Tensor = mixed + self.mlp(self.ln_2(mixed))
        return transformed


class _Transformer(nn.Module):
    """A value per patch to another: ``[T, patches, inputs]`` to ``[T, patches, outputs]``."""

    def __init__(self, config: WhamVitConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj1 = nn.Linear(inputs, config.hidden)
        self.pos_embeds = vqgan.empty_embedding(math.prod(config.grid), config.hidden)
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
        self._embedding = vqgan.empty_embedding(config.codes, config.code_width)

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
        images = vqgan.images_from_pixels(pixels, self.encoder.proj1.weight.dtype) / 255
        images = (images - _colours(MEAN, images)) / _colours(DEVIATION, images)
        latents = functional.normalize(self.encoder(self._patches(images)), dim=-1)
        tokens = vqgan.nearest_code(latents, self.vq_vae.codebook)
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
        return vqgan.pixels_from_images(images.clamp(0, 1) * 255)

    def _images(self, patches: Tensor) -> Tensor:
        """Put ``[T, patches, 3 * patch * patch]`` together as ``[T, 3, H, W]``, cropping the padding."""
        patch = self.config.patch
        cut = patches.reshape(-1, *self.config.grid, 3, patch, patch)
        images = cut.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return images[:, :, : self.config.height, : self.config.width]


def _colours(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return vqgan.constant(values, like).reshape(3, 1, 1)
