"""The same figures from PyTorch, many rollouts at once, and from a bundle on its engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diagd.export.exporter import export, open_sources
from diagd.export.families import find
from diagd.export.families.world import WorldDescription
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import RowSeed, Schedule, StreamLayout
from worlds.folder import World, load_world, save_world
from worlds.model import BundleModel, Rollouts, TorchModel

LAYOUT = StreamLayout(3, 4, before=1)
DESCRIPTION = WorldDescription("0.3m", 3, 4, 8, 16, 16, ("stay", "go"), 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[TorchModel, BundleModel]:
    folder = tmp_path_factory.mktemp("world")
    model = Transformer(DESCRIPTION.transformer_config()).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embedding.mul_(50)
        model.head.mul_(2)
    codebook = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    save_world(folder, World(DESCRIPTION, model, {"codebook": torch.from_numpy(codebook)}), {})
    family = find("world", str(folder))
    bundle = folder / "small.diagd"
    export(family, GraphOptions(), open_sources(family, None, None), bundle)
    return TorchModel(load_world(folder)), BundleModel(str(bundle), threads=1)


def streams(count: int, frames: int) -> np.ndarray:
    random = np.random.default_rng(1)
    rows = random.integers(0, 16, (count, frames, LAYOUT.frame_length))
    rows[:, :, 0] = random.integers(16, 18, (count, frames))
    return rows.reshape(count, -1)


SCHEDULES = [
    Schedule.next_token(LAYOUT),
    Schedule.chained(LAYOUT, 1),
    Schedule.serial(LAYOUT, 2, RowSeed.DUPLICATE),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_likelihoods_agree(models: tuple[TorchModel, BundleModel], schedule: Schedule) -> None:
    torch_nll, bundle_nll = (model.nll(streams(2, 4), schedule) for model in models)
    assert np.isnan(torch_nll[:, : LAYOUT.frame_length]).all()
    np.testing.assert_allclose(bundle_nll, torch_nll, atol=2e-3)
    assert np.nanstd(torch_nll) > 0.3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampling", [SamplingSettings(0), SamplingSettings(1.0, 0, 0.9)])
def test_rollouts_agree(
    models: tuple[TorchModel, BundleModel], schedule: Schedule, sampling: SamplingSettings
) -> None:
    given = streams(3, 4)
    torch_tokens, bundle_tokens = (
        s.roll_out(Rollouts(given, 2, [schedule], sampling, seed=5))[0] for s in models
    )
    np.testing.assert_array_equal(torch_tokens, bundle_tokens)
    frames = torch_tokens.reshape(3, 4, -1)
    np.testing.assert_array_equal(frames[:, :2], given.reshape(3, 4, -1)[:, :2])
    np.testing.assert_array_equal(frames[:, :, 0], given.reshape(3, 4, -1)[:, :, 0])
    assert len({row.tobytes() for row in frames[:, 2:, 1:]}) == 3


def test_orders_that_are_rolled_out_together_give_what_each_gives_alone(
    models: tuple[TorchModel, BundleModel],
) -> None:
    """To the token, next-token prediction guessed by others included; a prompt is fed once."""
    _, model = models
    given, sampling = streams(20, 4), SamplingSettings(1.0, 0, 0.9)
    sessions, rows = model._group.sessions, []

    def roll_out(schedules: list[Schedule]) -> list[np.ndarray]:
        for session in sessions:
            session.timing.recent.clear()
        made = model.roll_out(Rollouts(given, 2, schedules, sampling, seed=5))
        rows.append(sum(step.rows for session in sessions for step in session.timing.recent))
        return made

    alone = [roll_out([schedule])[0] for schedule in SCHEDULES]
    np.testing.assert_array_equal(roll_out(SCHEDULES), alone)
    roll_out(SCHEDULES[1:])
    assert rows[1] + rows[2] - rows[-1] == 20 * (LAYOUT.first_cell(1) + LAYOUT.cells - 1)


def test_pixels_agree(models: tuple[TorchModel, BundleModel]) -> None:
    tokens = np.random.default_rng(2).integers(0, 16, (3, 3, 4))
    first, second = (model.pixels(tokens) for model in models)
    assert first.shape == (3, 24, 32, 3)
    np.testing.assert_array_equal(first, second)
