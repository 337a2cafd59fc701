"""The products of a transformer, against the parameters of its module."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diagd.bundle.transformer import NormKind, TextShape, TransformerConfig
from diagd.export.step_graph import Fold, projections
from diagd.export.transformer import Transformer
from diagd.schedule import StreamLayout
from tests.oracles.models import small_model

PLAIN = small_model(StreamLayout(2, 3), layers=2, context_frames=2).config
CONFIGS = {
    "gated": PLAIN,
    "gelu": replace(PLAIN, gated=False, bias=True, norm=NormKind.LAYER, tied_head=True),
    "text": replace(PLAIN, text=TextShape(4, 8)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_matrix_of_a_step_is_a_product(config: TransformerConfig) -> None:
    """All but tables that are looked up and what a text's rows are made with."""
    shapes = {
        f"transformer.{name}": tuple(parameter.shape)
        for name, parameter in Transformer(config).named_parameters()
        if parameter.dim() == 2 and "embedding" not in name and not name.endswith("key_value")
    }
    found = {p.name: (p.inputs, p.outputs) for p in projections(config)}
    assert found == shapes


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_absorbs_factors_is_in_the_model(config: TransformerConfig) -> None:
    sizes = {f"transformer.{n}": p.shape[-1] for n, p in Transformer(config).named_parameters()}
    for projection in projections(config):
        for tensor in projection.fold.tensors if projection.fold else ():
            assert sizes[tensor] >= (projection.fold.start if projection.fold else 0) + projection.inputs


def test_products_know_what_absorbs_their_factors() -> None:
    folds = {p.name: p.fold for p in projections(PLAIN)}
    assert len(folds) == 9
    for layer in range(2):
        start = f"transformer.layers.{layer}"
        assert folds[f"{start}.attention.qkv"] == Fold((f"{start}.attention_norm.weight",))
        assert folds[f"{start}.feed_forward.gate_up"] == Fold((f"{start}.feed_forward_norm.weight",))
        gate_up = (f"{start}.feed_forward.gate_up",)
        assert folds[f"{start}.feed_forward.down"] == Fold(gate_up, PLAIN.feed_forward)
        assert folds[f"{start}.attention.out"] is None
    assert folds["transformer.head"] == Fold(("transformer.norm.weight",))
    shifted = {p.name: p.fold for p in projections(CONFIGS["gelu"])}
    norm = "transformer.layers.0.attention_norm"
    assert shifted["transformer.layers.0.attention.qkv"] == Fold((f"{norm}.weight", f"{norm}.bias"))
    assert shifted["transformer.layers.0.feed_forward.down"] is None


def test_factors_that_are_folded_cancel() -> None:
    """In the module itself: dividing what absorbs a factor and multiplying the matrix changes nothing."""
    model = small_model(StreamLayout(2, 3), layers=1, context_frames=2).double()
    ids, positions = torch.randint(0, 8, (1, 6)), torch.arange(6)
    before = model(ids, positions)
    state = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for projection in projections(model.config):
        if projection.fold is None:
            continue
        factors = torch.rand(projection.inputs, generator=generator, dtype=torch.float64) + 0.5
        state[projection.name] *= factors[:, None]
        for tensor in projection.fold.tensors:
            start = projection.fold.start
            state[tensor][..., start : start + projection.inputs] /= factors
    torch.testing.assert_close(model(ids, positions), before)
