"""The forms that benchmarks compare against decode the tokens that they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.baselines import OptimisedForm, PublishedForm
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
