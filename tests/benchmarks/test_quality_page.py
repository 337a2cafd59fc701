from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from benchmarks.quality.figures import SEEDS, CompatRow, Figures, GapRow, SizeFigures, TrainingRow
from benchmarks.quality.page import quality_page
from diagd.schedule import Schedule
from diagd.tuning.prefer import PreferReport, ProbeReport
from diagd.tuning.reward import Change, Choice, Verdict
from tests.worlds.test_evaluate import LAYOUT, OPTIONS, evaluation
from worlds.evaluate import Drift, Scores, measure_drift
from worlds.metrics import Estimate

CERTAIN, NOISE = Estimate(0.02, 0.001, 8), Estimate(0.001, 0.001, 8)


def table(page: str, heading: str, number: int = 0) -> list[list[str]]:
    """Rows of the n-th table under a heading."""
    section = page.split(f"# {heading}")[1].split("\n## ")[0]
    tables = [part for part in section.split("\n\n") if part.startswith("|")]
    return [[c.strip() for c in line.strip("|").split("|")] for line in tables[number].splitlines()]


@cache
def scores(*, is_frozen: bool = False) -> list[Scores]:
    judge = evaluation(is_frozen=False)
    other = evaluation(is_frozen=is_frozen)
    raster, chained = Schedule.next_token(LAYOUT), Schedule.chained(LAYOUT, 1)
    return [judge.score("NTP", raster)[0], other.score("k=1 chained", chained)[0]]


GAPS = [GapRow("k=1 chained", 38, {s.value: CERTAIN for s in SEEDS}, NOISE)]


UP, SAME = Change(0.6, 0.65, 0.02, 0.08), Change(0.6, 0.6, -0.01, 0.01)
REPORT = PreferReport(
    "k=1 chained",
    ProbeReport(0.8, 0.3, 0.7, 0.1),
    112,
    110,
    (0.6, 0.5, 0.4),
    Choice(0.59, UP, 0.66),
    {
        "preferences": Verdict({"truth": SAME, "followed": UP}, []),
        "winners": Verdict({"truth": SAME, "followed": SAME}, ["followed is not up", "dynamics are lower"]),
    },
    "preferences",
)


def test_the_shipped_model_shows_every_figure() -> None:
    drift = measure_drift(
        evaluation(is_frozen=False), Schedule.chained(LAYOUT, 1), np.full((2, 20), 3), stretches=4
    )
    figures = Figures(
        OPTIONS,
        SizeFigures(GAPS, scores(), drift),
        frames_per_second={"3m": {"NTP": 12, "k=1 chained": 31.25}},
    )
    page = quality_page(figures, "3m")
    row = table(page, "The shipped model: likelihood gap")[2]
    assert row == ["k=1 chained", "38", *["+0.0200 +- 0.0010"] * 4, "*+0.0010 +- 0.0010*"]
    heads, _, _, rollout = table(page, "The shipped model: rollouts")
    assert rollout[heads.index("walks followed")] == "1.000 +- 0.000"
    assert rollout[heads.index("frames/s")] == "31.2"
    assert [line[0] for line in table(page, "The shipped model: drift")[2:]] == ["7", "12", "17", "22"]
    assert "Other sizes" not in page


def test_another_world_shows_what_holds_for_any() -> None:
    blind = [replace(score, geometry=None, recovered=CERTAIN) for score in scores()]
    drift = Drift([52, 102], [], [CERTAIN, NOISE], [NOISE, CERTAIN])
    page = quality_page(Figures(OPTIONS, worlds={"doom-3m": SizeFigures(GAPS, blind, drift)}), "3m")
    assert table(page, "doom-3m: likelihood gap")[2][:3] == ["k=1 chained", "38", "+0.0200 +- 0.0010"]
    heads, _, *rows = table(page, "doom-3m: rollouts")
    assert "walks followed" not in heads
    assert [row[heads.index("action recovered")] for row in rows] == ["0.020 +- 0.001"] * 2
    heads, _, first, _ = table(page, "doom-3m: drift")
    assert heads == ["up to frame", "action recovered", "dynamics"]
    assert first == ["52", "0.020 +- 0.001", "0.001 +- 0.001"]


def test_figures_beyond_the_noise_are_named() -> None:
    frozen, true = (SizeFigures(GAPS, scores(is_frozen=frozen)) for frozen in (True, False))
    page = quality_page(Figures(OPTIONS, sizes={"10m": frozen}), "3m").replace("\n", " ")
    assert "walks followed of k=1 chained" in page.split("beyond it are")[1]
    assert "invalid tiles of" not in page.split("beyond it are")[1]
    page = quality_page(Figures(OPTIONS, sizes={"10m": true}), "3m").replace("\n", " ")
    assert "none is beyond it" in page


def test_sizes_training_and_compat_show_every_figure() -> None:
    row = TrainingRow("NTP only", Estimate(0.05, 0.002, 8), {"k=1 chained": NOISE})
    training = {"crafter-3m": [row], "doom-3m": [replace(row, schedules=scores())]}
    compat = {"10m": [CompatRow("k=1 serial", NOISE, CERTAIN, CERTAIN)]}
    sizes = {"10m": SizeFigures(GAPS, scores())}
    figures = Figures(
        OPTIONS, None, compat, sizes, training, {"10m": {"NTP": 2.0, "k=1 chained": 7.5}}, {"10m": 10_400_000}
    )
    page = quality_page(figures, "3m")
    assert "### 10m: 10.40 M parameters, 24 rollouts" in page
    assert table(page, "Other sizes", 0)[3] == ["k=1 chained", "0.7500 +- 0.0000", "+0.2500 +- 0.0000"]
    assert table(page, "Other sizes", 1)[2][:3] == ["k=1 chained", "38", "+0.0200 +- 0.0010"]
    assert table(page, "Other sizes", 2)[3][-1] == "7.5"
    bare = replace(figures, sizes={"10m": SizeFigures([], scores())})
    assert "Other row seeds were not measured" in quality_page(bare, "3m")
    for world in training:
        trained = table(page, f"What training on the diagonal buys: {world}")[2]
        assert trained == ["NTP only", "0.0500 +- 0.0020", "*+0.0010 +- 0.0010*"]
    heads, _, *rolled = table(page, "What training on the diagonal buys: doom-3m", 1)
    assert [row[:2] for row in rolled] == [["NTP only", "NTP"], ["NTP only", "k=1 chained"]]
    assert rolled[0][heads.index("as NTP")] == "1.000 +- 0.000"
    assert table(page, "Strict steps")[2][:2] == ["10m", "k=1 serial"]
    assert table(page, "Strict steps")[2][2:] == ["*+0.0010 +- 0.0010*", *["+0.0200 +- 0.0010"] * 2]


def test_what_preferences_did_is_told() -> None:
    page = quality_page(Figures(OPTIONS, preferences={"doom-3m": REPORT}), "3m")
    heads, _, tuned, winners = table(page, "Preferences between rollouts: doom-3m")
    assert tuned[heads.index("followed")] == "0.6000 -> 0.6500 [+0.0200, +0.0800]"
    assert tuned[1] == "0.6000 -> 0.6000 [-1.00%, +1.00%]"
    assert (tuned[-1], winners[-1]) == ("passed", "followed is not up; dynamics are lower")
    assert "to 0.59 (correlation" in page
    assert "and 0.6600 of the true frames" in page.replace("\n", " ")


def test_each_world_answers_what_was_measured_of_it() -> None:
    named = [
        replace(score, name=name) for score, name in zip(scores(), ("next token", "k=1 chained"), strict=True)
    ]
    training = [TrainingRow("+ control", CERTAIN, {"k=1 chained": CERTAIN})]
    figures = Figures(
        OPTIONS,
        SizeFigures(GAPS, named),
        training={"doom-3m": training},
        worlds={"doom-3m": SizeFigures([replace(GAPS[0], without_refeed=CERTAIN)], named)},
        preferences={"crafter-3m": REPORT},
        compat={"3m": [CompatRow("k=1 chained", NOISE, NOISE, CERTAIN)], "doom-3m": []},
    )
    heads, _, *rows = table(quality_page(figures, "3m"), "What is asked")
    assert heads == ["question", "crafter-3m", "doom-3m"]
    answers = {question: told for question, *told in rows}
    assert answers["What does it cost?"] == ["+0.0200 +- 0.0010"] * 2
    assert answers["What if true row ends are never fed?"] == ["*+0.0010 +- 0.0010*", "+0.0200 +- 0.0010"]
    (released,) = (told for question, told in answers.items() if "released code" in question)
    assert released == ["+0.0200 +- 0.0010", ""]
    (trained,) = (told for question, told in answers.items() if question.startswith("Does training"))
    assert trained == ["", "+0.0200 +- 0.0010"]
    (preferred,) = (told for question, told in answers.items() if question.startswith("Does tuning"))
    assert preferred[0].startswith("yes; followed: preferences: +0.0500 [+0.0200, +0.0800]; winners: +0.0000")
    assert not any(question.startswith("How much faster") for question in answers)
    assert "What is asked" not in quality_page(Figures(OPTIONS), "3m")
