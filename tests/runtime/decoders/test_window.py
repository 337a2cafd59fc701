"""The window that decides most cells a second, for machines and worlds made up in arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from typing_extensions import override

from diagd.runtime.decoders.jacobi import WindowPolicy

CELLS = 108
ANY = np.zeros(CELLS, np.int64)


def run(
    seconds: Callable[[int], float], right: float, padded: np.ndarray, passes: int = 1500, seed: int = 0
) -> list[int]:
    """Windows chosen over many frames where each guess is right with one chance."""
    policy, random, chosen, left = WindowPolicy(CELLS), np.random.default_rng(seed), [], CELLS
    for _ in range(passes):
        rows = policy.choose(padded[:left], ANY)
        wrong = np.flatnonzero(random.random(rows - 1) > right)
        kept = int(wrong[0]) + 1 if wrong.size else rows
        width = int(padded[rows - 1])
        policy.add(ANY[:rows], kept, width, seconds(width) * random.uniform(0.9, 1.1))
        if left == CELLS:
            chosen.append(rows)
        if left == kept:
            policy.end()
        left = left - kept or CELLS
    return chosen[len(chosen) // 2 :]


def rate(rows: np.ndarray, seconds: Callable[[int], float], right: float, padded: np.ndarray) -> np.ndarray:
    decided = (right ** np.arange(CELLS)).cumsum()
    return np.array([decided[n - 1] / seconds(int(padded[n - 1])) for n in rows])


NARROW = np.arange(1, CELLS + 1, dtype=np.int32)
BUCKETS = np.where(NARROW <= 16, 16, 108)


@pytest.mark.parametrize("right", [0.6, 0.9, 0.97])
@pytest.mark.parametrize("row", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("padded", [NARROW, BUCKETS], ids=["any width", "two widths"])
def test_windows_are_near_the_best(right: float, row: float, padded: np.ndarray) -> None:
    def seconds(width: int) -> float:
        return 1e-3 * (1 + row * width)

    chosen = np.array(run(seconds, right, padded))
    best = rate(NARROW, seconds, right, padded).max()
    assert rate(chosen, seconds, right, padded).mean() > 0.85 * best


def test_where_no_guess_is_right_it_is_next_token_prediction() -> None:
    chosen = run(lambda width: 1e-3 * (1 + 0.1 * width), 0.0, NARROW)
    assert np.mean(np.array(chosen) <= 2) > 0.9


def test_it_looks_further_again_when_guesses_come_right() -> None:
    policy = WindowPolicy(CELLS)
    for _ in range(300):
        policy.add(ANY[: policy.choose(NARROW, ANY)], 1, 1, 2e-3)
    narrow = policy.choose(NARROW, ANY)
    for _ in range(300):
        rows = policy.choose(NARROW, ANY)
        policy.add(ANY[:rows], rows, rows, 1e-3 * (1 + 0.01 * rows))
    assert narrow <= 2
    assert policy.choose(NARROW, ANY) > 60


def test_a_pass_that_something_held_up_does_not_decide() -> None:
    policy = WindowPolicy(CELLS)
    for _ in range(100):
        policy.add(ANY[:40], 20, 40, 2e-3)
        policy.add(ANY[:20], 15, 20, 1.5e-3)
    before = policy.choose(NARROW, ANY)
    policy.add(ANY[:40], 20, 40, 10.0)
    assert abs(policy.choose(NARROW, ANY) - before) < 15


@pytest.mark.parametrize("right", [0.9, 0.97])
def test_windows_are_near_the_best_on_a_machine_at_work(right: float) -> None:
    random = np.random.default_rng(1)

    def alone(width: int) -> float:
        return 2e-3 + 1e-4 * width

    def beside_others(width: int) -> float:
        return alone(width) + float(random.exponential(0.012, random.poisson(100 * alone(width))).sum())

    chosen = np.array(run(beside_others, right, NARROW))
    best = rate(NARROW, alone, right, NARROW).max()
    assert rate(chosen, alone, right, NARROW).mean() > 0.9 * best


def frames(policy: WindowPolicy | None, at_random: float, count: int = 300) -> np.ndarray:
    """Seconds of frames where a draw behind a right cell nearly always is right, and behind others seldom.

    What a pass draws ahead of a wrong guess heals from its islands of right cells. None: steady windows.
    """
    random, taken = np.random.default_rng(0), np.zeros(count)
    for frame in range(count):
        right, kinds, decided = random.random(CELLS) < 0.25, ANY.copy(), 0
        while decided < CELLS:
            rows = policy.choose(NARROW[: CELLS - decided], kinds[decided:]) if policy else 16
            window = slice(decided, decided + rows)
            wrong = np.flatnonzero(~right[window][:-1])
            kept = int(wrong[0]) + 1 if wrong.size else len(right[window])
            seconds = 1e-3 * (0.9 + 0.12 * rows)
            taken[frame] += seconds
            if policy:
                policy.add(kinds[window], kept, rows, seconds * random.uniform(0.9, 1.2))
            behind = np.append(True, right[window][:-1])
            drawn = random.random(len(behind)) < np.where(behind, 0.95, at_random)
            right[window] = drawn | (right[window] & behind)
            right[decided : decided + kept] = True
            kinds[window], decided = 1, decided + kept
        if policy:
            policy.end()
    return taken


class NeverSteady(WindowPolicy):
    @override
    def end(self) -> None:
        """Windows are chosen for every frame."""


def test_steady_windows_stay_where_they_take_less() -> None:
    policies = WindowPolicy(CELLS), NeverSteady(CELLS), None
    chosen, trapped, steady = (frames(policy, at_random=0.5)[150:].sum() for policy in policies)
    assert chosen < steady < trapped


@pytest.mark.parametrize("at_random", [0.1, 0.3])
def test_trials_of_steady_windows_cost_little(at_random: float) -> None:
    chosen, never = (frames(policy, at_random).sum() for policy in (WindowPolicy(CELLS), NeverSteady(CELLS)))
    assert chosen < 1.03 * never < frames(None, at_random).sum()
