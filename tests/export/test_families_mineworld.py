"""A small MineWorld in the released .ckpt, against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diagd.bundle.transformer import TransformerConfig, linear_rotary
from diagd.export.families import mineworld
from diagd.schedule import StreamLayout
from tests.export.released import arrays_of, logits_of, module_of, random_rows, random_tensors
from tests.oracles import numpy_forward

FRAMES, HEAD_SIZE, IDS = 3, 8, 30


def test_logits_equal_the_network_in_numpy(tmp_path: Path) -> None:
    config = TransformerConfig(
        layout=StreamLayout(3, 4, after=2),
        context_frames=FRAMES,
        vocabulary=IDS,
        output_vocabulary=IDS,
        hidden=24,
        feed_forward=40,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=HEAD_SIZE,
        rotary=linear_rotary(HEAD_SIZE, 10_000.0),
    )
    family = mineworld.family("mineworld-small", config)
    tensors = random_tensors(family.expected)
    state = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    state["transformer.model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(HEAD_SIZE // 2)
    state["tokenizer.model.quant_conv.weight"] = torch.zeros(2, 2)
    path = tmp_path / "small.ckpt"
    torch.save({"state_dict": state, "epoch": 1}, path)
    rows = random_rows(config.layout, FRAMES, IDS)
    expected = numpy_forward.mineworld(arrays_of(tensors), *rows, HEAD_SIZE)
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits_of(module_of(family, path), *rows), expected, atol=5e-5)
