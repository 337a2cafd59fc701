"""The shipped weights do what their card says, on worlds recorded here and now."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diagd.cluster import ClusterOptions
from diagd.export.families.world import SHIPPED
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import Schedule
from diagd.tuning.recordings import FrameEncoder, TokenDataset, cached_tokens
from diagd.tuning.teacher_forcing import ForcedPasses, forced_nll
from worlds.collect import collect
from worlds.folder import World, load_world
from worlds.geometry import Geometry
from worlds.options import CollectOptions
from worlds.rollout import roll_out

FOLDER = SHIPPED / "crafter-3m"
LIMIT = 6 << 20


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    made: dict[str, float] = json.loads((FOLDER / "figures.json").read_text())["check"]
    return made


@pytest.fixture(scope="module")
def world() -> World:
    return load_world(FOLDER)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory, world: World) -> TokenDataset:
    folder = tmp_path_factory.mktemp("fresh")
    list(collect(CollectOptions(folder, episodes=3, steps=80, seed=2_000_000, who=ClusterOptions(workers=1))))
    return cached_tokens(folder, FrameEncoder.of_graphs(world.description.pixel_graphs(), world.tokenizer))


@pytest.fixture(scope="module")
def nll(world: World, recording: TokenDataset) -> np.ndarray:
    """Mean likelihood of each window, [schedules, windows]."""
    starts = recording.window_starts(8)[::24]
    layout = world.description.layout
    schedules = [Schedule.next_token(layout), Schedule.serial(layout, 1), Schedule.chained(layout, 1)]
    passes = ForcedPasses(schedules, 8, score_prompt=False)
    streams = recording.windows(starts, 8)
    return np.stack([np.nanmean(forced_nll(world.model, passes, streams, n), axis=1) for n in range(3)])


def test_likelihood_is_the_card_s(nll: np.ndarray, figures: dict[str, float]) -> None:
    assert nll[0].mean() == pytest.approx(figures["nll_ntp"], abs=0.005)


def test_diagonal_decoding_costs_what_the_card_says(nll: np.ndarray, figures: dict[str, float]) -> None:
    gaps = (nll[1:] - nll[0]).mean(1)
    assert gaps == pytest.approx([figures["gap_serial"], figures["gap_chained"]], abs=0.003)


def test_rollouts_follow_actions(world: World, recording: TokenDataset, figures: dict[str, float]) -> None:
    layout, codes = world.description.layout, world.description.codes
    streams = recording.windows(recording.window_starts(5)[::32], 5)
    schedule, sampling = Schedule.chained(layout, 1), SamplingSettings(temperature=0)
    rolled = roll_out(world.model, streams, 2, schedule, sampling, seed=0, window=8)
    frames = rolled.reshape(len(streams), 5, -1)
    cells = frames[:, :, 1:].reshape(-1, 5, layout.rows, layout.columns)
    shape = (-1, layout.rows, layout.columns)
    actions = frames[:, 2:, 0].ravel() - codes
    geometry = Geometry.learn(recording, codes)
    verdict = geometry.follows(cells[:, 1:-1].reshape(shape), cells[:, 2:].reshape(shape), actions)
    assert verdict.followed[verdict.counts].mean() >= figures["followed"] - 0.05


def test_codebook_loses_nothing(world: World, recording: TokenDataset) -> None:
    assert world.description.used_codes < world.description.codes
    assert recording.streams[:, 1:].max() < world.description.used_codes


def test_files_are_small() -> None:
    assert sum(path.stat().st_size for path in Path(FOLDER).iterdir()) <= LIMIT
