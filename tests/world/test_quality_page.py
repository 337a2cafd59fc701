from __future__ import annotations

from dataclasses import asdict

import numpy as np

from diagd.schedule import Schedule
from diagd.world.evaluate import measure_drift
from diagd.world.metrics import Estimate
from diagd.world.quality_page import SEEDS, GapRow, quality_page
from diagd.world.study import diagonal_lags
from tests.world.test_evaluate import LAYOUT, OPTIONS, evaluation


def table(page: str, heading: str) -> list[list[str]]:
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    return [
        [c.strip() for c in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]


def test_page_shows_every_figure() -> None:
    judge = evaluation(is_frozen=False)
    chained = Schedule.chained(LAYOUT, 1)
    score, _ = judge.score("k=1 chained", chained)
    certain, noise = Estimate(0.02, 0.001, 8), Estimate(0.001, 0.001, 8)
    gaps = [GapRow("k=1 chained", 38, {s.value: certain for s in SEEDS}, noise)]
    drift = asdict(measure_drift(judge, chained, np.full((2, 20), 3), stretches=4))
    page = quality_page(gaps, [score], drift, {"k=1 chained": 31.25}, OPTIONS)
    row = table(page, "Likelihood gap")[2]
    assert row == ["k=1 chained", "38", *["+0.0200 +- 0.0010"] * 4, "*+0.0010 +- 0.0010*"]
    heads, _, rollout = table(page, "Rollouts")
    assert rollout[heads.index("walks followed")] == "1.000 +- 0.000"
    assert rollout[heads.index("frames/s")] == "31.2"
    assert [line[0] for line in table(page, "Drift")[2:]] == ["7", "12", "17", "22"]


def test_study_covers_serial_and_chained_frames() -> None:
    assert diagonal_lags(LAYOUT) == [(1, 20), (1, 9), (2, 28), (2, 18), (4, 44), (4, 36)]
