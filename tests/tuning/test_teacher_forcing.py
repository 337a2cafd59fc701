"""The mask of the parallel forward against decoding simulated step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diagd.schedule import RowSeed, Schedule, StreamLayout
from diagd.tuning.teacher_forcing import NOT_SCORED, ForcedPasses, forced_nll
from tests.oracles.full_recompute import FullRecompute
from tests.oracles.models import random_stream, small_model
from tests.oracles.rows import rows_of

LAYOUTS = [StreamLayout(3, 4, before=1), StreamLayout(4, 3, prefix=1, before=1, after=2), StreamLayout(2, 3)]


def schedules(layout: StreamLayout) -> list[Schedule]:
    return [
        Schedule.next_token(layout),
        *(Schedule.serial(layout, 1, seed) for seed in RowSeed),
        *(Schedule.chained(layout, k, seed) for seed in RowSeed for k in (1, 2)),
        Schedule(layout, 1, layout.rows, RowSeed.ABOVE, refeed=False, keep_seeds=True),
    ]


CASES = [(layout, schedule) for layout in LAYOUTS for schedule in schedules(layout)]


@pytest.mark.parametrize(("layout", "schedule"), CASES)
def test_visibility_equals_brute_force(layout: StreamLayout, schedule: Schedule) -> None:
    """Replays the cache: what is in it, and not void, when each row runs."""
    visible = ForcedPasses([schedule], frames=3).visible[0].numpy()
    cache: list[tuple[int, int]] = []
    expected = np.zeros_like(visible)
    row = 0
    for step in rows_of(schedule.table(1, 2, 0)):
        numbers = list(range(row, row + len(step)))
        cache += [(n, r.position) for n, r in zip(numbers, step, strict=True)]
        for n, r in zip(numbers, step, strict=True):
            for slot, position in cache:
                expected[n, slot] = position <= r.position
        if not schedule.keep_seeds:
            guesses = {n for n, r in zip(numbers, step, strict=True) if r.source != r.position}
            cache = [entry for entry in cache if entry[0] not in guesses]
        row += len(step)
    np.testing.assert_array_equal(visible, expected)


@pytest.mark.parametrize(("layout", "schedule"), CASES)
def test_every_cell_behind_the_prompt_is_scored_once(layout: StreamLayout, schedule: Schedule) -> None:
    targets = ForcedPasses([schedule], frames=3).targets[0]
    cells = [layout.first_cell(t) + c for t in (1, 2) for c in range(layout.cells)]
    assert sorted(targets[targets != NOT_SCORED].tolist()) == cells


@pytest.mark.parametrize(("layout", "schedule"), CASES)
def test_nothing_is_fed_before_it_is_decoded(layout: StreamLayout, schedule: Schedule) -> None:
    table = schedule.table(1, 2, 0)
    decoded_at: dict[int, int] = {}
    for step, rows in enumerate(rows_of(table)):
        for row in rows:
            is_cell = row.source >= layout.first_cell(1) and (
                0 <= (row.source - layout.first_cell(0)) % layout.frame_length < layout.cells
            )
            assert not is_cell or decoded_at[row.source] < step
        decoded_at |= {row.sink: step for row in rows}


def test_prompt_is_scored_on_request() -> None:
    layout = LAYOUTS[0]
    targets = ForcedPasses([Schedule.chained(layout, 1)], frames=2, score_prompt=True).targets[0]
    scored = sorted(targets[targets != NOT_SCORED].tolist())
    assert scored == [layout.first_cell(t) + c for t in (0, 1) for c in range(layout.cells)]


def test_padding_changes_nothing_else() -> None:
    short, long = Schedule.next_token(LAYOUTS[0]), Schedule.chained(LAYOUTS[0], 1)
    alone, padded = ForcedPasses([short], frames=2), ForcedPasses([short, long], frames=2)
    rows = alone.targets.shape[1]
    assert rows < padded.targets.shape[1]
    np.testing.assert_array_equal(padded.visible[0, :rows, :rows], alone.visible[0])
    assert not padded.visible[0, :rows, rows:].any()
    assert (padded.targets[0, rows:] == NOT_SCORED).all()
    assert padded.visible[0].diagonal().all()  # a row that sees nothing would be NaN


@pytest.mark.parametrize("schedule", schedules(LAYOUTS[1]))
def test_likelihood_equals_step_by_step_decoding(schedule: Schedule) -> None:
    """A greedy stream scored in one forward, against the logits that decoding it produced."""
    layout = schedule.layout
    model = small_model(layout)
    stream = random_stream(layout, frames=3, known=1)
    oracle = FullRecompute(model, keep_seeds=schedule.keep_seeds)
    logits = oracle.run(rows_of(schedule.table(1, 2, 0)), stream)
    nll = forced_nll(model, ForcedPasses([schedule], 3), stream[None], 0)[0]
    for position, row in logits.items():
        expected = -torch.log_softmax(row, -1)[stream[position]]
        assert nll[position] == pytest.approx(expected.item(), abs=2e-4)
    assert np.isnan(np.delete(nll, list(logits))).all()
