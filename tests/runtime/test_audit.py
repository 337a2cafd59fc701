"""What is said to be next-token prediction's is what it decodes, cell by cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import diagd
from diagd.runtime.comparison import audit, redrawn
from diagd.runtime.decoders import JacobiDecoder, RasterDecoder, ScheduledDecoder
from diagd.runtime.session import Session
from diagd.schedule import NO_SINK, Schedule
from tests.runtime.test_stream import SETTINGS, actions, prompt

FRAMES, SEED = 7, 5


@pytest.fixture
def session(small_bundle: Path) -> Session:
    return diagd.load(small_bundle, threads=1)


def made(session: Session, decoder: diagd.Decoder) -> np.ndarray:
    prompt(session)
    run = session.frames(decoder, actions(session.layout, FRAMES), sampling=SETTINGS, seed=SEED)
    return np.stack([frame.tokens for frame in run])


def shares(session: Session, frames: np.ndarray) -> np.ndarray:
    prompt(session)
    return audit(session, frames, actions(session.layout, FRAMES), sampling=SETTINGS, seed=SEED)


def test_frames_of_next_token_prediction_are_its_own(session: Session) -> None:
    assert shares(session, made(session, JacobiDecoder(5))).tolist() == [1.0] * FRAMES


def test_the_share_is_that_of_next_token_prediction_behind_the_same_tokens(session: Session) -> None:
    """Worked out with a session of its own for every frame, and a pass for every cell."""
    frames = made(session, ScheduledDecoder(Schedule.serial(session.layout, 1)))
    found = shares(session, frames)
    given, expected = actions(session.layout, FRAMES), []
    prompt(session)
    for frame, ids in zip(frames, given, strict=True):
        drawn = list[int]()
        for step, result in session.steps(
            RasterDecoder([frame], 1), [ids], count=1, sampling=SETTINGS, seed=SEED
        ):
            drawn += result.tokens.tolist() if (step.sinks != NO_SINK).any() else []
        expected.append(float(np.mean(np.array(drawn) == frame.reshape(-1))))
    np.testing.assert_array_equal(found, expected)
    assert found.min() < 1


def test_what_is_drawn_does_not_depend_on_the_width_of_passes(session: Session) -> None:
    frames = made(session, ScheduledDecoder(Schedule.chained(session.layout, 1)))
    drawn = []
    for rows in (1, 7, None):
        prompt(session)
        given = actions(session.layout, FRAMES)
        drawn.append(redrawn(session, frames, given, rows=rows, sampling=SETTINGS, seed=SEED))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_other_random_numbers_make_other_frames(session: Session) -> None:
    frames = made(session, JacobiDecoder())
    prompt(session)
    other = audit(session, frames, actions(session.layout, FRAMES), sampling=SETTINGS, seed=SEED + 1)
    assert other.mean() < 0.9
