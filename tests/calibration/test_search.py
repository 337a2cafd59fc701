"""Migration of outliers, on inputs that have some."""

from __future__ import annotations

import numpy as np
import pytest

from diagd.calibration.options import SCHEMES
from diagd.calibration.search import InputStatistics, migration, search
from diagd.export.step_graph import Fold, Projection

CHANNELS, COLUMNS = 256, 96


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of which four channels are forty times the others, and a weight."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((300, CHANNELS)).astype(np.float32)
    rows[:, :4] *= 40
    weight = (random.standard_normal((CHANNELS, COLUMNS)) / 16).astype(np.float32)
    weight[:4] /= 40
    return rows, weight


def relative_error(rows: np.ndarray, weight: np.ndarray, scheme: str, *, fold: bool) -> float:
    seen = InputStatistics.empty(CHANNELS)
    seen.add("w", rows, seed=0)
    projection = Projection("w", CHANNELS, COLUMNS, Fold(("norm",)) if fold else None)
    choice = search(projection, weight, seen, SCHEMES[scheme], grouped=False)
    assert (choice.factors is not None) == fold
    return 10 ** (-choice.signal_to_noise / 20)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_planted_outliers_are_recovered(scheme: str) -> None:
    rows, weight = planted()
    without = relative_error(rows, weight, scheme, fold=False)
    assert without > 0.14
    assert relative_error(rows, weight, scheme, fold=True) < 0.2 * without


def test_factors_move_magnitude_and_keep_the_product() -> None:
    rows, weight = planted()
    factors = migration(np.abs(rows).max(0), weight, 0.5)
    assert factors[:4].min() > 5 * factors[4:].max()
    assert np.exp(np.log(factors).mean()) == pytest.approx(1, rel=1e-5)
    moved = (rows / factors).astype(np.float64) @ (weight * factors[:, None])
    assert np.allclose(moved, rows.astype(np.float64) @ weight, atol=1e-4)


def test_channels_that_are_never_used_keep_their_place() -> None:
    rows, weight = planted()
    reach = np.abs(rows).max(0)
    reach[7], weight[9] = 0, 0
    factors = migration(reach, weight, 0.5)
    assert factors[[7, 9]].tolist() == [1, 1]
    assert np.isfinite(factors).all()
