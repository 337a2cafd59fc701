from __future__ import annotations

import numpy as np
import pytest

from tests.worlds.walks import CODES, GROUND, ICON, ROCK, recording, walk
from worlds.geometry import SHIFTS, Geometry, shift_agreement
from worlds.simulator import COLUMNS, ROWS, SCROLL, VIEW_ROWS


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    return Geometry.learn(recording(4, 120), CODES)


def test_ground_and_rock_are_told_apart(geometry: Geometry) -> None:
    assert geometry.is_ground[list(GROUND)].all()
    assert not geometry.is_ground[ROCK]


def test_true_frames_follow_every_action(geometry: Geometry) -> None:
    frames, actions = walk(200, seed=9)
    verdict = geometry.follows(frames[:-1], frames[1:], actions[1:])
    assert verdict.counts.mean() > 0.9
    assert verdict.followed[verdict.counts].all()
    assert (verdict.agreement == 1).all()
    assert 0.4 < verdict.walks.mean() < 0.7


def test_a_frozen_picture_follows_no_walk(geometry: Geometry) -> None:
    frames, actions = walk(200, seed=9)
    frozen = np.broadcast_to(frames[0], frames.shape)
    verdict = geometry.follows(frozen[:-1], frozen[1:], actions[1:])
    walks = verdict.counts & verdict.walks
    assert walks.any()
    assert not verdict.followed[walks].any()


def test_a_walk_the_wrong_way_is_caught(geometry: Geometry) -> None:
    frames, actions = walk(200, seed=9)
    mirrored = np.array([0, 2, 1, 4, 3, 5])[actions]
    verdict = geometry.follows(frames[:-1], frames[1:], mirrored[1:])
    moved = shift_agreement(frames[:-1], frames[1:])[:, 0] < 1
    assert not verdict.followed[verdict.counts & moved].any()


def test_uniform_ground_tells_nothing(geometry: Geometry) -> None:
    plain = np.zeros((2, ROWS, COLUMNS), int)
    assert not geometry.follows(plain[:1], plain[1:], np.array([1])).counts.any()


def test_invalid_tiles_depend_on_the_region(geometry: Geometry) -> None:
    frame = np.full((1, ROWS, COLUMNS), ICON)
    frame[:, :VIEW_ROWS] = 0
    assert not geometry.invalid(frame).any()
    frame[0, 2, 3], frame[0, 8, 1], frame[0, 1, 1] = ICON, 0, CODES - 1
    assert sorted(map(tuple, np.argwhere(geometry.invalid(frame)[0]))) == [(1, 1), (2, 3), (8, 1)]


def test_agreement_finds_each_shift() -> None:
    random = np.random.default_rng(0)
    world = random.integers(0, 50, (20, 20))
    before = world[5 : 5 + ROWS, 4 : 4 + COLUMNS]
    for n, (dy, dx) in enumerate(SHIFTS):
        after = world[5 + dy : 5 + dy + ROWS, 4 + dx : 4 + dx + COLUMNS]
        agreement = shift_agreement(before[None], after[None])[0]
        assert agreement[n] == 1
        assert (np.delete(agreement, n) < 0.3).all()
    assert len(SHIFTS) == 1 + len(SCROLL)
