from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import diagd
from diagd.engines.sampler import noise
from diagd.errors import UsageError
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.schedule import Schedule
from tests.models import export_small
from tests.oracles.models import CODES, small_model
from tests.runtime.conftest import LAYOUT


@pytest.fixture(scope="module")
def fair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose ids are all equally probable, whatever it is fed."""
    model = small_model(LAYOUT, layers=1, context_frames=4)
    with torch.no_grad():
        model.head.zero_()
    return export_small(model, tmp_path_factory.mktemp("fair") / "fair.diagd")


@pytest.fixture
def session(fair: Path) -> Iterator[Session]:
    with diagd.load(fair, threads=1, window=3) as opened:
        yield opened


@pytest.mark.parametrize("order", ["next token", "k=1 serial", "k=1 chained", "k=2 chained"])
def test_every_order_meets_the_noise_of_the_place_in_the_stream(session: Session, order: str) -> None:
    """With equal weights the least noise wins. The window slides and keys are turned back meanwhile."""
    frames, seed, schedule = 40, 11, Schedule.parse(order, LAYOUT)
    session.start(np.zeros((1, 4, 6), np.int32), np.zeros((1, 3), np.int32))
    run = session.generate(
        frames, np.zeros((frames, 3), np.int32), schedule=schedule, sampling=SamplingSettings(), seed=seed
    )
    ids = np.arange(CODES)
    for frame in run:
        cells = LAYOUT.first_cell(frame.index) + np.arange(LAYOUT.cells)
        made = [noise(seed, np.full(CODES, cell), ids).argmin() for cell in cells]
        assert frame.tokens.reshape(-1).tolist() == made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected 0 .greedy. or"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"top_k": -3}, "top-k is -3"),
        ({"top_k": 1.5}, "top-k is 1.5"),
        ({"top_k": float("nan")}, "top-k is nan"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.2}, "at most 1"),
        ({"temperature": "1"}, "temperature is '1'; expected a number"),
        ({"top_p": None}, "top_p is None; expected a number"),
    ],
)
def test_bad_settings(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplingSettings(**values)  # type: ignore[arg-type]
