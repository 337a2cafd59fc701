"""Between uint8 frames and the channel-first floating-point images that networks take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def images_from_pixels(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames uint8 ``[T, H, W, 3]`` as images ``[T, 3, H, W]`` with values 0 .. 255."""
    return pixels.permute(0, 3, 1, 2).to(dtype)


def pixels_from_images(images: Tensor) -> Tensor:
    """Images ``[T, 3, H, W]`` with values 0 .. 255, truncated to frames uint8 ``[T, H, W, 3]``."""
    return images.permute(0, 2, 3, 1).to(torch.uint8)


def constant(values: Sequence[float] | NDArray[np.float64], like: Tensor) -> Tensor:
    """A literal of the graph with the dtype and device of ``like``.

    Made from host memory at the time of the call, so that a module built or traced on the meta device still
    exports its values.
    """
    return torch.tensor(np.asarray(values).tolist(), dtype=like.dtype, device="cpu").to(like.device)
