"""The oracle itself, against shorter arguments that hold in special cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diagd.schedule import RowSeed, Schedule, StreamLayout
from tests.oracles.full_recompute import FullRecompute, lengthened
from tests.oracles.models import CODES, random_stream, small_model
from tests.oracles.rows import rows_of
from tests.oracles.simulator import Simulator

BOTH_GAPS = StreamLayout(3, 4, prefix=1, before=1, after=2)
NO_GAP = StreamLayout(3, 4)
SAMPLED = range(CODES)


@pytest.mark.parametrize("refeed", [True, False])
@pytest.mark.parametrize("row_seed", RowSeed)
@pytest.mark.parametrize(("k", "d"), [(1, 3), (1, 6), (2, 7), (4, 12)])
@pytest.mark.parametrize("layout", [BOTH_GAPS, NO_GAP])
def test_tables_and_simulator_decode_the_same(
    layout: StreamLayout, k: int, d: int, row_seed: RowSeed, refeed: bool
) -> None:
    model = small_model(layout)
    schedule = Schedule(layout, k, d, row_seed, refeed, keep_seeds=not refeed)
    by_table = random_stream(layout, 4, 2)
    by_cell = by_table.copy()
    oracles = [FullRecompute(model, sampled=SAMPLED, keep_seeds=not refeed) for _ in range(2)]
    logits = oracles[0].run(rows_of(schedule.table(2, 2, 0)), by_table)
    expected = oracles[1].run(Simulator(layout, k, d, row_seed, refeed, 2, 2, 0).steps(), by_cell)
    np.testing.assert_array_equal(by_table, by_cell)
    assert by_table.min() >= 0
    assert list(logits) == list(expected)
    assert all(torch.equal(logits[cell], expected[cell]) for cell in expected)


def test_next_token_prediction_is_plain_autoregression() -> None:
    layout = BOTH_GAPS
    model = small_model(layout)
    tokens = random_stream(layout, 3, 1)
    expected = tokens.copy()
    logits = FullRecompute(model, sampled=SAMPLED).run(
        rows_of(Schedule.next_token(layout).table(1, 2, 0)), tokens
    )
    assert len(set(tokens[layout.first_cell(1) :].tolist())) > 8
    for cell in np.flatnonzero(expected < 0).tolist():
        with torch.no_grad():
            output = model(torch.tensor(expected[None, :cell]), torch.arange(cell))[0, -1]
        expected[cell] = int(output[:CODES].argmax())
        torch.testing.assert_close(logits[cell], output, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize(("d", "window"), [(3, None), (6, None), (3, 3), (6, 2)])
def test_one_layer_sees_exactly_the_true_tokens_decoded_before(d: int, window: int | None) -> None:
    """With one layer a key depends on its own token alone, so a query is a plain softmax over true tokens."""
    layout, frames = BOTH_GAPS, 7
    model = lengthened(small_model(layout, layers=1, context_frames=2), frames)
    schedule = Schedule(layout, 1, d)
    tokens = random_stream(layout, frames, 1)
    steps = rows_of(schedule.table(1, frames - 1, 0))
    logits = FullRecompute(model, sampled=SAMPLED, window=window).run(steps, tokens)
    fed: set[int] = set()
    floor = 0
    for rows in steps:
        for row in rows:
            frame, place = divmod(row.sink - layout.first_cell(0), layout.frame_length)
            if window and row.sink >= 0 and place == 0:
                floor = layout.frame_start(frame - window + 1)
        seen = {p for p in fed if p >= floor or p < layout.prefix}
        true = {row.position for row in rows if row.source == row.position}
        for row in (row for row in rows if row.sink >= 0):
            positions = [*sorted(p for p in seen | true if p < row.position), row.position]
            ids = [int(tokens[p]) for p in positions[:-1]] + [int(tokens[row.source])]
            with torch.no_grad():
                output = model(torch.tensor([ids]), torch.tensor(positions))[0, -1]
            torch.testing.assert_close(logits[row.sink], output, rtol=1e-4, atol=1e-4)
        fed |= true
    assert (floor > 0) == (window is not None)


def test_streams_continue_with_the_next_table() -> None:
    layout = BOTH_GAPS
    model, schedule = small_model(layout), Schedule.serial(layout, 1)
    at_once = random_stream(layout, 4, 1)
    one_by_one = at_once.copy()
    logits = FullRecompute(model, sampled=SAMPLED, window=2).run(rows_of(schedule.table(1, 3, 0)), at_once)
    decoder = FullRecompute(model, sampled=SAMPLED, window=2)
    parts: dict[int, torch.Tensor] = {}
    for frame in (1, 2, 3):
        fed = 0 if frame == 1 else layout.first_cell(frame) - layout.gap - 1
        parts |= decoder.run(rows_of(schedule.table(frame, 1, fed)), one_by_one)
    np.testing.assert_array_equal(at_once, one_by_one)
    assert all(torch.equal(logits[cell], parts[cell]) for cell in logits)


def test_a_window_shorter_than_the_overlap_is_refused() -> None:
    layout = NO_GAP
    steps = rows_of(Schedule.chained(layout, 1).table(1, 2, 0))
    with pytest.raises(ValueError, match="behind the window"):
        FullRecompute(small_model(layout), window=1).run(steps, random_stream(layout, 3, 1))
