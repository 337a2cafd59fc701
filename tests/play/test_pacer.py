"""Ticks on a clock of our own."""

from __future__ import annotations

import pytest

from diagd.play.stage import Pacer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_ticks_come_at_the_rate_and_missed_ones_are_not_made_up_for() -> None:
    clock = Clock()
    pacer = Pacer(10, clock)
    assert pacer.delay() == 0
    for _ in range(5):
        clock.now += pacer.delay()
        pacer.tick()
        clock.now += 0.03
        pacer.add(0.03)
    assert clock.now == pytest.approx(100.43)
    assert pacer.fps == pytest.approx(10)
    clock.now += 1
    pacer.tick()
    assert pacer.late == 1
    assert pacer.delay() == pytest.approx(0.1)


def test_a_frame_before_its_time_is_followed_a_period_later() -> None:
    clock = Clock()
    pacer = Pacer(10, clock)
    pacer.tick()
    clock.now += 0.04
    pacer.tick()
    assert pacer.delay() == pytest.approx(0.1)
    assert pacer.late == 0


def test_the_rate_is_one_that_can_be_kept() -> None:
    pacer = Pacer(60, Clock())
    assert pacer.rate == 60
    for _ in range(200):
        pacer.add(0.05)
    assert pacer.rate == pytest.approx(18)
    assert pacer.percentile(50) == pytest.approx(0.05)


@pytest.mark.parametrize("before", [1, 8, 30])
def test_a_machine_that_slept_amid_a_frame_is_no_slow_one(before: int) -> None:
    clock = Clock()
    pacer = Pacer(10, clock)
    for seconds in [0.03] * before + [3600.0] + [0.03] * 5:
        pacer.tick()
        clock.now += seconds
        pacer.add(seconds)
        assert pacer.delay() <= 0.1
    assert pacer.rate == 10
    assert pacer.percentile(95) == pytest.approx(0.03)


def test_a_rest_is_no_lateness() -> None:
    clock = Clock()
    pacer = Pacer(10, clock)
    pacer.tick()
    clock.now += 50
    pacer.rest()
    pacer.tick()
    assert pacer.late == 0
