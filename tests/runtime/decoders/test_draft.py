"""Draft and target: at either end of the knob one of the two alone, to the token; between, frame by frame."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import diagd
from diagd.errors import UsageError
from diagd.runtime.comparison import audit
from diagd.runtime.decoders import Decoder, DraftDecoder, JacobiDecoder, RasterDecoder, ScheduledDecoder
from diagd.runtime.decoders.draft import Proposal
from diagd.runtime.session import Session
from diagd.runtime.step import Frame
from diagd.schedule import Schedule, StreamLayout
from tests.models import export_small
from tests.oracles.models import small_model
from tests.runtime.test_stream import LAYOUTS, SETTINGS, actions, prompt

FRAMES, SEED = 9, 5
Drafters = dict[str, Callable[[StreamLayout], Decoder | None]]
DRAFTERS: Drafters = {
    "its own order": lambda _: None,
    "jacobi": lambda _: JacobiDecoder(4),
    "a diagonal": lambda layout: ScheduledDecoder(
        Schedule.serial(layout, 1) if layout.before else Schedule.chained(layout, 1)  # the absolute model's
    ),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a drafter that is another model of the same stream."""
    absolute, layout = request.param.startswith("absolute"), LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("draft")
    target = small_model(layout, layers=2, context_frames=4, rotary=not absolute)
    drafter = small_model(layout, layers=1, context_frames=4, rotary=not absolute, seed=4)
    return export_small(target, folder / "target.diagd"), export_small(drafter, folder / "drafter.diagd")


@pytest.fixture
def pair(paths: tuple[Path, Path]) -> tuple[Session, Session]:
    target, drafter = (diagd.load(path, threads=1) for path in paths)
    return target, drafter


def decode(session: Session, decoder: Decoder | None) -> tuple[np.ndarray, list[Frame]]:
    prompt(session)
    given = actions(session.layout, FRAMES)
    made = list(session.frames(decoder, given, count=FRAMES, sampling=SETTINGS, seed=SEED))
    return np.stack([frame.tokens for frame in made]), made


def never(proposal: Proposal) -> float:
    raise AssertionError("no score is needed")


def every_other() -> Callable[[Proposal], float]:
    turns = iter(range(1000))
    return lambda _: float(next(turns) % 2 == 0)


@pytest.mark.parametrize("name", DRAFTERS)
def test_an_infinite_bar_leaves_the_target_alone(pair: tuple[Session, Session], name: str) -> None:
    target, drafter = pair
    truth, _ = decode(target, ScheduledDecoder(Schedule.next_token(target.layout)))
    decoder = DraftDecoder(drafter, math.inf, never, decoder=DRAFTERS[name](target.layout))
    tokens, frames = decode(target, decoder)
    np.testing.assert_array_equal(tokens, truth)
    assert all(frame.exact for frame in frames)
    assert not any(decoder.kept)


@pytest.mark.parametrize("name", DRAFTERS)
def test_no_bar_leaves_the_drafter_alone(pair: tuple[Session, Session], name: str) -> None:
    target, drafter = pair
    own, expected = DRAFTERS[name](target.layout), []
    prompt(drafter)
    for ids in actions(target.layout, FRAMES):
        expected.append(drafter.step(ids, own, sampling=SETTINGS, seed=SEED).tokens)
    decoder = DraftDecoder(drafter, -math.inf, never, decoder=own)
    tokens, _ = decode(target, decoder)
    np.testing.assert_array_equal(tokens, np.stack(expected))
    assert decoder.kept == [True] * FRAMES


@pytest.mark.parametrize("name", DRAFTERS)
def test_each_frame_is_the_drafters_or_the_targets_behind_the_frames_before(
    pair: tuple[Session, Session], name: str
) -> None:
    target, drafter = pair
    own = DRAFTERS[name](target.layout)
    decoder = DraftDecoder(drafter, 0.5, every_other(), decoder=own)
    tokens, frames = decode(target, decoder)
    assert not decoder.kept[0]
    assert any(decoder.kept)
    prompt(target)
    given = actions(target.layout, FRAMES)
    shares = audit(target, tokens, given, sampling=SETTINGS, seed=SEED)
    assert [frame.exact for frame in frames] == (shares == 1).tolist()
    assert all(share == 1 for share, kept in zip(shares, decoder.kept, strict=True) if not kept)
    prompt(drafter)
    for frame, ids, kept in zip(tokens, given, decoder.kept, strict=True):
        drafted = drafter.step(ids, own, sampling=SETTINGS, seed=SEED).tokens
        if kept:
            np.testing.assert_array_equal(frame, drafted)
        else:
            drafter.stream.rewind(1)
            forced = RasterDecoder([frame])
            list(drafter.frames(forced, [ids], count=1, sampling=SETTINGS, seed=SEED))


def test_a_stream_of_both_goes_on_as_one_that_was_given_its_tokens(paths: tuple[Path, Path]) -> None:
    target, drafter, fresh = (diagd.load(paths[at], threads=1) for at in (0, 1, 0))
    decode(target, DraftDecoder(drafter, 0.5, every_other()))
    fresh.stream.restore(target.stream.snapshot())
    runs = [
        one.frames(JacobiDecoder(5), actions(one.layout, 3, 8), count=3, sampling=SETTINGS, seed=SEED)
        for one in (target, fresh)
    ]
    for ours, theirs in zip(*runs, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_the_first_frame_is_the_targets_after_every_start_and_move(pair: tuple[Session, Session]) -> None:
    target, drafter = pair
    decoder, given = DraftDecoder(drafter, 0.0, lambda _: 1.0), actions(target.layout, 2)
    rolls = target.manifest.context.kind == "absolute"

    def goes_elsewhere() -> None:
        """To a stream of as many frames, two of them of another decoder."""
        target.stream.rewind(2)
        list(target.frames(JacobiDecoder(), given, count=2, sampling=SETTINGS, seed=SEED + 1))

    begins, moves_back = partial(prompt, target, 1), partial(target.stream.rewind, 1)
    moves: list[Callable[[], None]] = [begins, moves_back, begins, goes_elsewhere]
    for move in moves:
        move()
        decoder.kept.clear()
        list(target.frames(decoder, given, count=2, sampling=SETTINGS, seed=SEED))
        assert decoder.kept[0] is False
        assert decoder.kept[1] is True or rolls
    decoder = DraftDecoder(drafter, 0.0, lambda _: 1.0, target_first=False)
    prompt(target)
    list(target.frames(decoder, given, count=2, sampling=SETTINGS, seed=SEED))
    assert decoder.kept == [True, True]


def test_a_frame_whose_context_was_fed_again_is_the_targets(pair: tuple[Session, Session]) -> None:
    target, drafter = pair
    decoder = DraftDecoder(drafter, 0.0, lambda _: 1.0)
    _, frames = decode(target, decoder)
    assert decoder.kept == [number > 0 and not frame.refill_steps for number, frame in enumerate(frames)]
    assert any(frame.refill_steps for frame in frames[1:]) == (target.manifest.context.kind == "absolute")


def test_what_nothing_can_be_drafted_with_is_named(pair: tuple[Session, Session]) -> None:
    _, drafter = pair
    for given, message in (
        ((None, 0.0, never), "drafter is None; expected a Session"),
        (("k=1", 0.0, never), "drafter is 'k=1'; expected a Session"),
        ((drafter, "0.5", never), "tau is '0.5'; expected a number"),
        ((drafter, None, never), "tau is None; expected a number"),
        ((drafter, 0.0, "likelihood"), "score is 'likelihood'; expected a Callable"),
    ):
        with pytest.raises(UsageError, match=message):
            DraftDecoder(*given)
    assert DraftDecoder(drafter, np.float32(0.5), never).kept == []  # type: ignore[arg-type]


def test_drafters_that_do_not_fit_are_refused(pair: tuple[Session, Session], tmp_path: Path) -> None:
    target, drafter = pair
    with pytest.raises(UsageError, match="tau is not a number"):
        DraftDecoder(drafter, math.nan, never)
    prompt(target)
    given = actions(target.layout, 1)
    with pytest.raises(UsageError, match="open a second session"):
        list(target.frames(DraftDecoder(target, 0.0, never), given, count=1))
    other = small_model(StreamLayout(2, 2, before=2), layers=1, context_frames=4)
    stranger = diagd.load(export_small(other, tmp_path / "other.diagd"), threads=1)
    with pytest.raises(UsageError, match="the same layout, tokens and window"):
        list(target.frames(DraftDecoder(stranger, 0.0, never), given, count=1))
