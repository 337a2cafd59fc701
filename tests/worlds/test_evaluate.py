from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from diagd.schedule import Schedule, StreamLayout
from diagd.tuning.rollouts import Streams
from tests.worlds.recordings import patch_encoder
from tests.worlds.walks import CODES, recording
from worlds.evaluate import Evaluation, measure_drift
from worlds.geometry import Geometry
from worlds.metrics import Estimate
from worlds.model import Rollouts
from worlds.options import EvalOptions
from worlds.report import scores_table, write_figures, write_scores
from worlds.run_eval import walk_actions
from worlds.simulator import COLUMNS, ROWS

LAYOUT = StreamLayout(ROWS, COLUMNS, before=1)
OPTIONS = EvalOptions(windows=4, window_frames=4, rollouts=24, prompt=2, frames=3)


class Known:
    """Plays the true frames (they are in the streams it is given) or repeats the last frame of the prompt."""

    layout, codes, context_frames = LAYOUT, CODES, 9
    encoder = patch_encoder(np.zeros((CODES, 8, 8, 3), np.uint8), ROWS, COLUMNS)

    def __init__(self, *, is_frozen: bool) -> None:
        self.is_frozen = is_frozen

    def nll(self, streams: Streams, schedule: Schedule) -> NDArray[np.float32]:
        nll = np.full(streams.shape, 0.5 if schedule.k == COLUMNS else 0.75, np.float32)
        nll[:, : LAYOUT.frame_length] = np.nan
        return nll

    def roll_out(self, asked: Rollouts) -> list[Streams]:
        return [self.rolled(asked.streams, asked.prompt, schedule) for schedule in asked.orders]

    def rolled(self, streams: Streams, prompt: int, schedule: Schedule) -> Streams:
        rolled = streams.copy()
        if self.is_frozen:
            frames = rolled.reshape(len(rolled), -1, LAYOUT.frame_length)
            frames[:, prompt:, 1:] = frames[:, prompt - 1 : prompt, 1:]
        return rolled

    def pixels(self, tokens: NDArray[np.integer]) -> NDArray[np.uint8]:
        grey = (tokens * 30).astype(np.uint8)[..., None].repeat(3, -1)
        return grey.repeat(8, 1).repeat(8, 2)


def evaluation(*, is_frozen: bool) -> Evaluation:
    geometry = Geometry.learn(recording(6, 100), CODES)
    return Evaluation(Known(is_frozen=is_frozen), recording(6, 100), geometry, OPTIONS)


def test_an_oracle_scores_one() -> None:
    scores, _ = evaluation(is_frozen=False).score("oracle", Schedule.chained(LAYOUT, 1))
    assert scores.geometry is not None and scores.truth.dynamics is not None and scores.ntp_match is not None
    assert scores.geometry.followed.mean == 1
    assert scores.geometry.walks_followed.mean == 1
    assert scores.geometry.agreement.mean == 1
    assert scores.geometry.invalid.mean == 0
    assert [estimate.mean for estimate in scores.truth.match] == [1, 1, 1]
    assert all(estimate.mean > 58 for estimate in scores.truth.psnr)
    assert all(estimate.mean == pytest.approx(1) for estimate in scores.truth.ssim)
    assert scores.truth.frechet.mean == pytest.approx(0, abs=1e-6)
    assert scores.truth.dynamics.mean == 1
    assert scores.ntp_match.mean == 1
    assert scores.geometry.followed.count == 24
    assert scores.passes == LAYOUT.columns + 8 + 2 * 9


def test_a_frozen_picture_fails() -> None:
    scores, _ = evaluation(is_frozen=True).score("frozen", Schedule.chained(LAYOUT, 1))
    assert scores.geometry is not None and scores.truth.dynamics is not None
    assert scores.geometry.walks_followed.mean == 0
    assert scores.geometry.followed.mean < 0.7
    matches = [estimate.mean for estimate in scores.truth.match]
    assert max(matches) < 0.7
    assert scores.truth.dynamics.mean == 0


def test_the_gap_is_paired_with_next_token_prediction() -> None:
    judge = evaluation(is_frozen=False)
    assert judge.score("k1", Schedule.chained(LAYOUT, 1))[0].nll_gap.mean == pytest.approx(0.25)
    assert judge.score("ntp", Schedule.next_token(LAYOUT))[0].nll_gap.mean == 0


def test_rollouts_are_compared_with_those_of_next_token_prediction() -> None:
    class Mixed(Known):
        """Freezes under every schedule but next-token prediction, which plays the truth."""

        def rolled(self, streams: Streams, prompt: int, schedule: Schedule) -> Streams:
            self.is_frozen = schedule.k != COLUMNS
            return super().rolled(streams, prompt, schedule)

    geometry = Geometry.learn(recording(6, 100), CODES)
    judge = Evaluation(Mixed(is_frozen=False), recording(6, 100), geometry, OPTIONS)
    whole, _ = judge.score("ntp", Schedule.next_token(LAYOUT))
    frozen, _ = judge.score("k1", Schedule.chained(LAYOUT, 1))
    assert whole.ntp_match is not None and frozen.ntp_match is not None
    assert whole.ntp_match.mean == 1
    matches = [estimate.mean for estimate in frozen.truth.match]
    assert frozen.ntp_match.mean == pytest.approx(np.mean(matches))
    assert frozen.ntp_match.mean < 0.7


def test_drift_is_reported_by_stretch() -> None:
    actions = np.full((3, 20), 3)
    drift = measure_drift(evaluation(is_frozen=True), Schedule.chained(LAYOUT, 1), actions, stretches=4)
    assert drift.frames == [7, 12, 17, 22]
    assert len(drift.scores) == 4
    assert all(scores.invalid.mean == 0 for scores in drift.scores)


def test_figures_are_written_and_shown(tmp_path: Path) -> None:
    scores, _ = evaluation(is_frozen=False).score("oracle", Schedule.chained(LAYOUT, 1))
    write_scores(tmp_path / "eval.json", [scores], {"model": "oracle"})
    kept = json.loads((tmp_path / "eval.json").read_text())
    assert kept["schedules"][0]["geometry"]["followed"] == {"mean": 1.0, "error": 0.0, "count": 24}
    assert scores_table([scores]).row_count == 1
    write_figures(tmp_path, {"of one": Estimate.of(np.ones(1))}, {})
    assert '"error": null' in (tmp_path / "eval.json").read_text()  # NaN is no JSON


def test_walks_are_seeded_actions() -> None:
    actions = walk_actions(3, 50, seed=1)
    assert actions.shape == (3, 50)
    assert 0 <= actions.min() <= actions.max() < 8
    np.testing.assert_array_equal(actions, walk_actions(3, 50, seed=1))
    assert not np.array_equal(actions[0], actions[1])
