"""Estimates are the roofline's sums, and what does not fit into the budget is cut and said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from diagd.bundle import Bundle
from diagd.engines.ceilings import Ceilings
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.planning.model import read_model
from diagd.profiling import measure as measuring
from diagd.profiling.budget import Extent, Pace, cuts, factors, find_pace, fit
from diagd.profiling.measure import measure, random_workload
from diagd.profiling.orders import decoding_orders
from diagd.profiling.page import page
from diagd.profiling.profile import SPENT, ProfileOptions, profile
from diagd.progress import Progress
from diagd.runtime.load import open_session
from diagd.schedule import Schedule
from tests.profiling.conftest import LAYOUT

CPU = CpuOptions(threads=1)
CEILINGS = Ceilings(copied=2e10, read=1e10, peak=1e11, threads=1)


@pytest.fixture(scope="module")
def pace(bundle: Bundle) -> Pace:
    model = read_model(bundle.path)
    return Pace(open_session(bundle, cpu=CPU), model, CEILINGS, narrow=(3.0, 4.0), wide=2.0, picture=0.5)


def test_an_estimate_is_what_its_steps_cost(bundle: Bundle, pace: Pace) -> None:
    """Against the rows and live slots that a real run has."""
    schedule, session = Schedule.chained(LAYOUT, 1), pace.session
    run = measure(session, schedule, random_workload(session, 2, 2), 2)
    model = pace.model
    expected = 2 * 0.5
    for index, step in enumerate(run.steps):
        read = model.streamed_bytes + 2 * 2 * 2 * 8 * 4 * step.live  # two layers of two heads of eight
        operations = step.rows * (2 * model.size.streamed + 4 * 2 * model.size.query_width * step.live)
        memory, arithmetic = (2.0, 2.0) if index <= run.chunks else (3.0, 4.0)
        expected += memory * read / 2e10 + arithmetic * operations / 1e11
    assert pace.run(schedule, 2, 2) == pytest.approx(expected, rel=0.02)  # row seeds take slots for a step


def test_the_largest_extent_that_fits_is_chosen(bundle: Bundle, pace: Pace) -> None:
    orders, wanted = decoding_orders(bundle.manifest, (1, 2)), Extent(3, 8)
    tried = list(wanted.smaller())
    assert tried == [
        *(Extent(3, 8), Extent(3, 4), Extent(3, 2)),
        *(Extent(3, 2, cold=False), Extent(2, 2, cold=False), Extent(1, 2, cold=False)),
    ]
    times = [pace.seconds(orders, extent) for extent in tried]
    assert times == sorted(times, reverse=True)
    for extent, seconds in zip(tried, times, strict=True):
        assert fit(pace, orders, wanted, seconds) == extent
    assert fit(pace, orders, wanted, 0.0) == Extent(1, 2, cold=False)
    assert fit(pace, orders, wanted, 0.0, keep_prompt=True) == Extent(3, 2, cold=False)


def test_a_probe_finds_how_far_from_the_limits_steps_are(bundle: Bundle, pace: Pace) -> None:
    found = find_pace(pace.session, pace.model, CEILINGS)
    slower = find_pace(pace.session, pace.model, Ceilings(2e18, 1e18, 1e19, 1))
    assert min(sum(found.narrow), found.wide) > 0
    assert sum(slower.narrow) > 1e4 * sum(found.narrow)
    assert found.picture == 0


def test_memory_and_arithmetic_have_factors_of_their_own() -> None:
    limits = np.stack([np.full(6, 2.0), np.arange(1.0, 7.0)], axis=1)
    assert factors(limits, limits @ (1.5, 0.75)) == pytest.approx((1.5, 0.75))
    assert factors(limits[:1], np.array([6.0])) == (2.0, 2.0)
    falling = factors(limits, np.arange(12.0, 6.0, -1.0))
    assert falling[0] == falling[1] > 0


def test_what_is_done_tells_how_slow_the_rest_is(bundle: Bundle, pace: Pace) -> None:
    orders, extent = decoding_orders(bundle.manifest, (1,)), Extent(3, 2)
    assert pace.slower([], extent, 0.0) == 1.0
    assert pace.slower(orders[:2], extent, 3 * pace.seconds(orders[:2], extent)) == pytest.approx(3.0)


def test_nothing_is_cut_that_fits() -> None:
    assert cuts(Extent(3, 4), Extent(3, 4), 4) == ()


def test_a_spent_budget_is_told(bundle: Bundle) -> None:
    told: list[str] = []
    options = ProfileOptions(ks=(1,), frames=4, budget=1e-3, cpu=CPU)
    report = profile(bundle, options, tell=told.append).report
    assert [run.order for run in report.runs] == ["next token"]
    assert [(entry.order, entry.reason) for entry in report.skipped] == [
        ("k=1 serial", SPENT),
        ("k=1 chained", SPENT),
    ]
    assert report.runs[0].frames == 2
    assert report.runs[0].first_run is None
    assert len(report.cuts) == 3
    assert "2 frames of each order instead of 4" in report.cuts[0]
    assert "a prompt of 1 frames instead of 3" in report.cuts[2]
    assert report.estimate is not None
    assert told == [f"about {report.estimate:.0f} s for 3 decoding orders; " + "; ".join(report.cuts)]
    for cut in report.cuts:
        assert cut in page(report)


def test_a_large_budget_changes_nothing(bundle: Bundle) -> None:
    options = ProfileOptions(ks=(1,), frames=3, budget=1e6, cpu=CPU)
    report = profile(bundle, options).report
    assert report.cuts == report.skipped == ()
    assert [run.frames for run in report.runs] == [2, 3, 3]


class Told(Progress):
    """Keeps what bars were made and how far they got."""

    def __init__(self) -> None:
        super().__init__()
        self.bars: list[tuple[str, int, list[int]]] = []

    @contextmanager
    def count(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        moves: list[int] = []
        self.bars.append((title, total, moves))
        yield moves.append


def test_progress_is_told_inside_an_order(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of the cold frame and of the measured ones, in more than one go."""
    monkeypatch.setattr(measuring, "SECONDS", 0.002)
    told = Told()
    report = profile(bundle, ProfileOptions(ks=(1,), frames=4, cpu=CPU), told).report
    assert [title.rpartition(",")[0] for title, _, _ in told.bars] == [
        *("next token, 1 of 3 orders", "k=1 serial, 2 of 3 orders", "k=1 chained, 3 of 3 orders")
    ]
    assert all(title.endswith("s left") for title, _, _ in told.bars)
    for (_, total, moves), run in zip(told.bars, report.runs, strict=True):
        assert sum(moves) == total > run.passes
    assert sum(move > 0 for move in told.bars[0][2]) > 2
