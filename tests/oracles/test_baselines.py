"""The forms that benchmarks compare against decode the tokens that they should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.baselines import OptimisedForm, PublishedForm
from diagd.bundle.transformer import grid_rotary
from diagd.errors import UsageError
from diagd.export.transformer import Transformer
from diagd.schedule import RowSeed, Schedule, StreamLayout
from tests.oracles.full_recompute import FullRecompute
from tests.oracles.models import random_stream, small_model
from tests.oracles.rows import rows_of

LAYOUT = StreamLayout(4, 6, after=3)
MODEL = small_model(LAYOUT)
WEIGHTS = {name: tensor.numpy() for name, tensor in MODEL.state_dict().items()}


@pytest.mark.parametrize(("k", "d"), [(1, 4), (1, 9), (2, 9), (6, 24)])
def test_optimised_form_equals_recomputation(k: int, d: int) -> None:
    table = Schedule(LAYOUT, k, d).table(1, 3, 0)
    tokens = random_stream(LAYOUT, 4, 1)
    decoded = OptimisedForm(WEIGHTS, MODEL.config).run(table, 0, tokens)
    FullRecompute(MODEL).run(rows_of(table), tokens)
    np.testing.assert_array_equal(decoded, tokens)


@pytest.mark.parametrize(("k", "d"), [(1, 4), (1, 9), (2, 9), (6, 24)])
def test_published_form_equals_recomputation_with_empty_slots(k: int, d: int) -> None:
    table = Schedule(LAYOUT, k, d, RowSeed.PROMPT, refeed=False, keep_seeds=True).table(1, 3, 0)
    tokens = random_stream(LAYOUT, 4, 1)
    decoded = PublishedForm(WEIGHTS, MODEL.config, positions=len(tokens)).run(table, 0, tokens)
    FullRecompute(MODEL, keep_seeds=True, empty_slots=True).run(rows_of(table), tokens)
    np.testing.assert_array_equal(decoded, tokens)


def test_both_forms_start_from_the_same_random_cache() -> None:
    live = LAYOUT.first_cell(4) - 1
    table = Schedule.next_token(LAYOUT).table(4, 2, live)
    forms = [form(WEIGHTS, MODEL.config) for form in (PublishedForm, OptimisedForm)]
    published, optimised = (form.run(table, live) for form in forms)
    np.testing.assert_array_equal(published, optimised)
    np.testing.assert_array_equal(forms[1].run(table, live), optimised)
    assert (forms[1].run(table, 0) != optimised).any()


def test_bfloat16_runs_the_same_steps() -> None:
    table = Schedule.chained(LAYOUT, 1).table(1, 2, 0)
    for form in (PublishedForm, OptimisedForm):
        model = form(WEIGHTS, MODEL.config, torch.bfloat16)
        decoded = model.run(table, 0, random_stream(LAYOUT, 3, 1))
        assert model.keys.dtype is torch.bfloat16
        assert decoded[LAYOUT.first_cell(0) :].min() >= 0


@pytest.mark.parametrize(("k", "d"), [(1, 4), (2, 9)])
def test_norms_of_queries_and_keys_and_rotary_axes_of_cosmos(k: int, d: int) -> None:
    rotary = grid_rotary(8, 1e4, yarn_scale=2.0, trained=(3, 40))
    config = replace(MODEL.config, head_size=8, qk_norm=True, rotary=rotary)
    model = Transformer(config).initialise(torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        model.embedding.mul_(50)
        for number, norm in enumerate(
            module for module in model.modules() if isinstance(module, torch.nn.RMSNorm)
        ):
            norm.weight.copy_(torch.linspace(0.6, 1.7, norm.weight.numel()).roll(number))
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert "layers.0.attention.query_norm.weight" in weights
    table = Schedule(LAYOUT, k, d).table(1, 3, 0)
    tokens = random_stream(LAYOUT, 4, 1)
    decoded = OptimisedForm(weights, config).run(table, 0, tokens)
    FullRecompute(model).run(rows_of(table), tokens)
    np.testing.assert_array_equal(decoded, tokens)
    live = LAYOUT.first_cell(3) - 1
    table = Schedule(LAYOUT, k, d).table(3, 2, live)
    published, optimised = (form(weights, config) for form in (PublishedForm, OptimisedForm))
    np.testing.assert_array_equal(published.run(table, live), optimised.run(table, live))


def test_steps_filled_up_to_a_few_widths_decode_the_same_tokens() -> None:
    table = Schedule(LAYOUT, 1, 4, RowSeed.PROMPT, refeed=False, keep_seeds=True).table(1, 3, 0)
    tokens = random_stream(LAYOUT, 4, 1)
    form, widths = PublishedForm(WEIGHTS, MODEL.config, positions=len(tokens)), []
    forward = form._forward

    def watched(ids: torch.Tensor, positions: torch.Tensor, is_seed: torch.Tensor) -> torch.Tensor:
        widths.append(len(ids))
        return forward(ids, positions, is_seed)

    expected = form.run(table, 0, tokens)
    form._forward = watched  # type: ignore[method-assign]
    form.prefill(0)
    np.testing.assert_array_equal(form.decode(table, tokens, (1, 8, 64)), expected)
    assert set(widths) == {1, 8, 64}


def test_a_step_of_the_published_form_is_one_graph() -> None:
    """What torch.compile would break into pieces, it could not capture."""
    table = Schedule(LAYOUT, 1, 4, RowSeed.PROMPT, refeed=False, keep_seeds=True).table(1, 2, 0)
    tokens = random_stream(LAYOUT, 3, 1)
    form = PublishedForm(WEIGHTS, MODEL.config, positions=len(tokens))
    expected = form.run(table, 0, tokens)
    form._forward = torch.compile(form._forward, backend="eager", fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    form.prefill(0)
    np.testing.assert_array_equal(form.decode(table, tokens, (1, 8, 64)), expected)


def test_a_model_of_another_kind_is_refused() -> None:
    config = replace(MODEL.config, bias=True, gated=False)
    with pytest.raises(UsageError, match="this model has biases, feed-forward layers without a gate"):
        PublishedForm(WEIGHTS, config)
