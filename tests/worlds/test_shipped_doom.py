"""The shipped world of corridors does what its card says, on walks recorded here and now."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diagd.cluster import ClusterOptions
from diagd.export.families.world import SHIPPED
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import Schedule
from diagd.tuning.recordings import TokenDataset, cached_tokens
from diagd.tuning.rollouts import parts
from worlds.collect import collect
from worlds.doom import LEFT, RIGHT
from worlds.model import Rollouts, TorchModel, open_model
from worlds.options import CollectOptions

FOLDER = SHIPPED / "doom-3m"
LIMIT = 8_000_000


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    made: dict[str, float] = json.loads((FOLDER / "figures.json").read_text())["check"]
    return made


@pytest.fixture(scope="module")
def model() -> TorchModel:
    found = open_model(FOLDER)
    assert isinstance(found, TorchModel)
    return found


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory, model: TorchModel) -> TokenDataset:
    pytest.importorskip("vizdoom")
    folder, one = tmp_path_factory.mktemp("fresh"), ClusterOptions(workers=1)
    list(collect(CollectOptions(folder, game="doom", episodes=3, steps=60, seed=2_000_000, who=one)))
    return cached_tokens(folder, model.encoder)


def likelihoods(model: TorchModel, recording: TokenDataset) -> tuple[float, float]:
    """NLL of next-token prediction, and the gap of k = 1 chained to it, nats a token."""
    streams = recording.windows(recording.window_starts(8)[::12], 8)
    raster, chained = Schedule.next_token(model.layout), Schedule.chained(model.layout, 1)
    nll, diagonal = (np.nanmean(model.nll(streams, schedule)) for schedule in (raster, chained))
    return float(nll), float(diagonal - nll)


def turned(model: TorchModel, recording: TokenDataset) -> float:
    """Share of frames that show what was ahead on the other side of where a key turns to."""
    streams = recording.windows(recording.window_starts(3)[::4], 3)
    chained, greedy, right = Schedule.chained(model.layout, 1), SamplingSettings(0.0), []
    for key, sign in ((LEFT, 1), (RIGHT, -1)):
        led = streams.copy()
        led[:, 2 * model.layout.frame_length] = model.codes + key
        cells, _ = parts(model.roll_out(Rollouts(led, 2, [chained], greedy, 0))[0], model.layout)
        before, after = (np.stack([model.pixels(c[None])[0] for c in cells[:, n]]) for n in (1, 2))
        for old, new in zip(*(p[:, 24:48].mean((1, 3)) for p in (before, after)), strict=True):
            errors = [np.abs(new[20 + s : 76 + s] - old[20:76]).mean() for s in range(-20, 21)]
            if errors[20] > 4:  # else the picture is too uniform to tell
                right.append(np.sign(np.argmin(errors) - 20) == sign)
    return float(np.mean(right))


def test_likelihoods_are_the_card_s(
    model: TorchModel, recording: TokenDataset, figures: dict[str, float]
) -> None:
    nll, gap = likelihoods(model, recording)
    assert nll == pytest.approx(figures["nll_ntp"], abs=0.02)
    assert gap == pytest.approx(figures["gap_chained"], abs=0.01)


def test_corridors_turn_with_the_keys(
    model: TorchModel, recording: TokenDataset, figures: dict[str, float]
) -> None:
    assert turned(model, recording) >= figures["turned"] - 0.05


def test_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= LIMIT
