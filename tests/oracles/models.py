"""Small random models and streams."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from diagd.bundle.transformer import TransformerConfig, linear_rotary
from diagd.export.transformer import Transformer
from diagd.schedule import StreamLayout

CODES = 24
"""Visual tokens of the small models; ids from here on are actions."""


def small_model(
    layout: StreamLayout,
    *,
    layers: int = 2,
    context_frames: int = 8,
    seed: int = 0,
    rotary: bool = True,
    head_size: int = 8,
) -> Transformer:
    """A float32 model with grouped KV heads, random weights and logits spread over all ids.

    Positions are rotary, or learned.
    """
    config = TransformerConfig(
        layout=layout,
        context_frames=context_frames,
        vocabulary=CODES + 6,
        output_vocabulary=CODES + 6,
        hidden=32,
        feed_forward=48,
        layers=layers,
        heads=4,
        kv_heads=2,
        head_size=head_size,
        rotary=linear_rotary(head_size, 1e4) if rotary else None,
        position_embedding=not rotary,
    )
    model = Transformer(config).initialise(torch.Generator().manual_seed(seed)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        model.embedding.mul_(50)
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.RMSNorm)):
        torch.nn.init.uniform_(norm.weight, 0.7, 1.6, generator=generator)
    return model


def random_stream(layout: StreamLayout, frames: int, known: int, seed: int = 0) -> NDArray[np.int64]:
    """Tokens by position: random actions, random cells in the first ``known`` frames, -1 for other cells."""
    random = np.random.default_rng(seed)
    tokens = random.integers(CODES, CODES + 6, layout.frame_start(frames))
    for frame in range(frames):
        start = layout.first_cell(frame)
        tokens[start : start + layout.cells] = (
            random.integers(0, CODES, layout.cells) if frame < known else -1
        )
    return tokens
