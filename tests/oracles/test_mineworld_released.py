"""The released semantics against their published call counts and against an oracle built another way."""

from __future__ import annotations

import numpy as np
import pytest

from diagd.schedule import RowSeed, Schedule, StreamLayout
from tests.oracles.full_recompute import FullRecompute
from tests.oracles.mineworld_released import Mode, Policy, Released, decode_released
from tests.oracles.models import CODES, random_stream, small_model
from tests.oracles.rows import rows_of

LAYOUT = StreamLayout(4, 6, after=3)
FRAMES = 3
SEEDS: dict[Policy, RowSeed] = {"prompt": RowSeed.PROMPT, "repeat": RowSeed.DUPLICATE}


def released(tokens: np.ndarray, known: int, k: int, mode: Mode, policy: Policy) -> Released:
    blocks = tokens.reshape(-1, LAYOUT.frame_length)[:, LAYOUT.cells :]
    prompt = tokens[: LAYOUT.first_cell(known) - LAYOUT.after].tolist()
    actions = blocks[known - 1 : known - 1 + FRAMES].tolist()
    model = small_model(LAYOUT)
    return decode_released(model, prompt, actions, LAYOUT, k, mode, policy, FRAMES, range(CODES))


@pytest.mark.parametrize("known", [1, 2])
@pytest.mark.parametrize("policy", ["prompt", "repeat"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("mode", ["image", "video"])
def test_equals_recomputation_with_empty_slots(mode: Mode, k: int, policy: Policy, known: int) -> None:
    tokens = random_stream(LAYOUT, known + FRAMES, known)
    result = released(tokens, known, k, mode, policy)
    d = LAYOUT.rows * k if mode == "video" else (LAYOUT.rows - 1) * k + LAYOUT.columns
    schedule = Schedule(LAYOUT, k, d, SEEDS[policy], refeed=False, keep_seeds=True)
    table = schedule.table(known, FRAMES, 0)
    oracle = FullRecompute(small_model(LAYOUT), sampled=range(CODES), keep_seeds=True, empty_slots=True)
    oracle.run(rows_of(table), tokens)
    cells = tokens.reshape(-1, LAYOUT.frame_length)[known:, : LAYOUT.cells]
    np.testing.assert_array_equal(result.tokens.reshape(FRAMES, -1), cells)
    assert result.calls == table.steps


def test_naive_mode_is_plain_autoregression() -> None:
    tokens = random_stream(LAYOUT, 1 + FRAMES, 1)
    result = released(tokens, 1, 1, "naive", "prompt")
    FullRecompute(small_model(LAYOUT), sampled=range(CODES)).run(
        rows_of(Schedule.next_token(LAYOUT).table(1, FRAMES, 0)), tokens
    )
    cells = tokens.reshape(-1, LAYOUT.frame_length)[1:, : LAYOUT.cells]
    np.testing.assert_array_equal(result.tokens.reshape(FRAMES, -1), cells)
    assert result.calls == FRAMES * LAYOUT.cells
    assert len(np.unique(result.tokens)) > CODES // 3


@pytest.mark.parametrize(
    ("mode", "k", "calls"), [("image", 1, 27), ("image", 4, 54), ("video", 1, 17), ("video", 2, 28)]
)
def test_forward_calls(mode: Mode, k: int, calls: int) -> None:
    """F ((h-1) k + w) serial and (F h - 1) k + w chained, with F = 3, h = 4, w = 6."""
    assert released(random_stream(LAYOUT, 4, 1), 1, k, mode, "repeat").calls == calls


def test_empty_slots_change_tokens() -> None:
    """The comparison above would not notice a mask that hides unwritten slots if these were equal."""
    tokens = random_stream(LAYOUT, 1 + FRAMES, 1)
    result = released(tokens, 1, 1, "video", "prompt")
    schedule = Schedule(LAYOUT, 1, LAYOUT.rows, RowSeed.PROMPT, refeed=False, keep_seeds=True)
    FullRecompute(small_model(LAYOUT), sampled=range(CODES), keep_seeds=True).run(
        rows_of(schedule.table(1, FRAMES, 0)), tokens
    )
    cells = tokens.reshape(-1, LAYOUT.frame_length)[1:, : LAYOUT.cells]
    assert (result.tokens.reshape(FRAMES, -1) != cells).any()
