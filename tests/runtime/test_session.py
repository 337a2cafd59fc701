"""Sessions: reproducible, endless, in place, and clear about what they refuse."""

from __future__ import annotations

import resource
import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diagd
from diagd.engines.prefix import PrefixEngine
from diagd.errors import ScheduleError, UsageError
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.stream import Stream
from diagd.schedule import Schedule, StreamLayout
from tests.oracles.models import CODES
from tests.runtime.conftest import LAYOUT

SETTINGS = SamplingSettings(temperature=1.0, top_p=0.9)


def prompt(frames: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CODES, (frames, 4, 6)).astype(np.int32)


def actions(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(CODES, CODES + 6, (frames, 3)).astype(np.int32)


def tokens(session: Session, frames: int, schedule: Schedule | None = None, seed: int = 0) -> np.ndarray:
    decoded = session.generate(frames, actions(frames), schedule=schedule, sampling=SETTINGS, seed=seed)
    return np.stack([frame.tokens for frame in decoded])


def started(bundle: Path, frames: int = 1, **options: Any) -> Session:
    session: Session = diagd.load(bundle, threads=1, **options)
    session.start(prompt(frames), actions(frames, seed=9))
    return session


def test_a_seed_gives_the_same_tokens_whatever_the_width_of_a_pass(small_bundle: Path) -> None:
    wide, narrow = started(small_bundle, 3), started(small_bundle, 3)
    schedule = Schedule.chained(LAYOUT, 1)
    narrow.engine.max_width = int(schedule.table(2, 3, 0, 1).widths.max())
    expected = tokens(wide, 3, schedule, seed=5)
    np.testing.assert_array_equal(expected, tokens(narrow, 3, schedule, seed=5))
    assert narrow.timing.steps > wide.timing.steps


def test_another_seed_gives_other_tokens(small_bundle: Path) -> None:
    session = started(small_bundle)
    first = tokens(session, 3, seed=1)
    session.start(prompt())
    assert (first != tokens(session, 3, seed=2)).any()


def test_one_call_a_frame_equals_one_call_for_all(small_bundle: Path) -> None:
    together, apart = started(small_bundle), started(small_bundle)
    schedule = Schedule.serial(LAYOUT, 2)
    expected = tokens(together, 5, schedule)
    given = actions(5)
    frames = [
        next(iter(apart.generate(1, given[index : index + 1], schedule=schedule, sampling=SETTINGS)))
        for index in range(5)
    ]
    np.testing.assert_array_equal(expected, np.stack([frame.tokens for frame in frames]))


def test_stopping_between_chained_frames_leaves_no_trace(small_bundle: Path) -> None:
    """A caller that breaks off and goes on sees what a session sees that was given those frames."""
    interrupted, serial = started(small_bundle), Schedule.serial(LAYOUT, 1)
    frames = interrupted.generate(
        3, actions(3), schedule=Schedule.chained(LAYOUT, 1), sampling=SETTINGS, seed=3
    )
    kept = [frame.tokens for frame in islice(frames, 2)]
    frames.close()  # type: ignore[attr-defined]
    resumed = next(iter(interrupted.generate(1, actions(1, 4), schedule=serial, sampling=SETTINGS)))
    assert isinstance(interrupted.engine, PrefixEngine)
    positions = interrupted.engine.slot_position
    live = positions[positions != np.iinfo(np.int32).max]
    assert len(live) == len(set(live.tolist())) == LAYOUT.first_cell(3) + LAYOUT.cells - 1
    assert resumed.index == 3
    assert all(token.shape == (4, 6) for token in kept)


def test_generation_never_stops(small_bundle: Path) -> None:
    """Ten contexts: slots in use stay in the ring, memory stays flat, and no step grows."""
    session = started(small_bundle)
    assert isinstance(session.engine, PrefixEngine)
    capacity = session.engine.capacity
    tokens(session, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(8):
        tokens(session, 5)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    held = session.engine.slot_position != np.iinfo(np.int32).max
    assert session.stream.known == 49 > 10 * 4
    assert session.engine.capacity == capacity
    assert held.sum() <= 4 * LAYOUT.frame_length
    assert grown < 20_000  # KB; the buffers of this model are below 1 MB


def test_streams_yield_each_frame_when_it_is_complete(small_bundle: Path) -> None:
    session = started(small_bundle)
    seen = []
    for frame in session.generate(3, actions(3), schedule=Schedule.serial(LAYOUT, 1), sampling=SETTINGS):
        seen.append((frame.index, session.timing.steps, frame.steps))
    assert seen == [(1, 9, 9), (2, 18, 9), (3, 27, 9)]


def test_host_sampling_honours_the_ranges(small_bundle: Path) -> None:
    assert tokens(started(small_bundle), 4).max() < CODES


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((1, 3, 6), np.int32), "takes \\[frames, 4, 6\\]"),
        (np.zeros((4, 4, 6), np.int32), "at most 3 frames"),
        (np.zeros((0, 4, 6), np.int32), "takes \\[frames, 4, 6\\]"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(small_bundle: Path, frames: np.ndarray, message: str) -> None:
    session = diagd.load(small_bundle, threads=1)
    with pytest.raises(UsageError, match=message):
        session.start(frames, actions(max(1, len(frames))))


def test_missing_actions_and_prompts_are_refused(small_bundle: Path) -> None:
    session = diagd.load(small_bundle, threads=1)
    with pytest.raises(UsageError, match="call start"):
        session.generate(1, actions(1))
    session.start(prompt())
    with pytest.raises(UsageError, match="need actions of shape \\[2, 3\\]"):
        session.generate(2, actions(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "3"}, "window is '3'; expected an integer or None"),
        ({"window": 2.5}, "window is 2.5; expected an integer or None"),
        ({"sessions": 2.5}, "sessions is 2.5; expected an integer"),
        ({"roll": "1"}, "roll is '1'; expected an integer or None"),
        ({"precision": 3}, "precision is 3; expected a string or None"),
        ({"compat": 3}, "compat is 3; expected a string or None"),
        ({"backend": None}, "backend is None; expected a string or a Backend"),
        ({"form": "prefix"}, "form is 'prefix'; expected a Form or None"),
        ({"path": None}, "path is None; expected a string or a Path"),
        ({"threads": 1.5}, "CpuOptions: 'threads': Input should be a valid integer"),
        ({"prepack": "maybe"}, "CpuOptions: 'prepack': Input should be a valid boolean"),
    ],
)
def test_options_of_other_types_are_named(
    small_bundle: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        diagd.load(**{"path": small_bundle, **options})  # type: ignore[call-overload]


def test_arguments_of_other_types_are_named(small_bundle: Path) -> None:
    with started(small_bundle, window=np.int64(3)) as session:
        wrong: dict[str, Any] = {"count": "1", "sampling": {"temperature": 1}, "newer": 3}
        for name, given in wrong.items():
            with pytest.raises(
                UsageError, match=f"{'chosen' if name == 'sampling' else name} is .*; expected"
            ):
                session.frames(None, actions(1), **{name: given})
        with pytest.raises(UsageError, match="actions are 3; expected ids"):
            session.frames(None, 3)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="1 frames and 0 actions"):
            session.start(prompt(), 3)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="history is '1'; expected an integer or None"):
            session.stream.branch("1")  # type: ignore[arg-type]
        session.stream.rewind(0.0)  # type: ignore[arg-type]
    for make, name in ((diagd.ScheduledDecoder, "schedule"), (diagd.JacobiDecoder, "window")):
        with pytest.raises(UsageError, match=f"{name} is 'k=1'; expected a"):
            make("k=1")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="truth is 3; expected a Iterable or None"):
        diagd.ForcedDecoder(Schedule.serial(LAYOUT, 1), 3)  # type: ignore[arg-type]
    for make_order in (Schedule.serial, Schedule.chained):
        with pytest.raises(UsageError, match=r"k is 1\.5; expected an integer"):
            make_order(LAYOUT, 1.5)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="row_seed is 'above'; expected a RowSeed"):
            make_order(LAYOUT, 1, "above")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="spelling is 3; expected a string"):
        Schedule.parse(3, LAYOUT)  # type: ignore[arg-type]


def test_what_is_given_in_another_form_is_named(small_bundle: Path) -> None:
    with started(small_bundle) as session:
        for stream in ("x", None, Stream):
            with pytest.raises(UsageError, match=r"stream is .*; expected a Stream"):
                session.stream = stream  # type: ignore[assignment]
        other = session.stream.branch()
        other.vocabulary += 1
        with pytest.raises(UsageError, match=f"a window of 4 frames, {other.vocabulary} ids and"):
            session.stream = other
        for given in (diagd.JacobiDecoder, "", 0):
            with pytest.raises(UsageError, match=r"the decoder is .*; expected one such as"):
                session.step(actions(1)[0], given)  # type: ignore[arg-type]
        for of_a_run in (iter(actions(2)), lambda frame: actions(1)[0], 3, [[1, 2], [3], [4]]):
            with pytest.raises(UsageError, match=r"2 frames need actions of shape \[2, 3\], got [03] rows"):
                session.generate(2, of_a_run)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="ids are rows of several lengths"):
            session.step([[7, 8], [9]])  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="ids are rows of several lengths"):
            session.start([[[1, 2], [3]]])  # type: ignore[arg-type]
        for array in (np.array(8), np.array("x")):
            with pytest.raises(UsageError, match=r"actions are .*; expected ids"):
                session.frames(None, array)
            with pytest.raises(UsageError, match="1 frames and 0 actions"):
                session.start(prompt(), array)
        for frame in (-1, 5, None):
            with pytest.raises(UsageError, match=f"frame {frame} is not there; 1 are known"):
                session.stream.frame(frame)  # type: ignore[arg-type]
        stranger = diagd.ScheduledDecoder(Schedule.serial(StreamLayout(2, 3, after=3), 1))
        with pytest.raises(UsageError, match=r"the schedule is of .*; make one of session\.layout"):
            session.step(actions(1)[0], stranger)
        assert session.step(actions(1)[0].tolist()).index == 1
        session.start(torch.from_numpy(prompt()), torch.from_numpy(actions(1)))  # type: ignore[arg-type]


def test_windows_and_lags_that_cannot_be_are_refused(small_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"outside 2\.\.4"):
        diagd.load(small_bundle, window=5)
    with pytest.raises(ScheduleError, match="row lag k=7"):
        Schedule.serial(LAYOUT, 7)
    session = started(small_bundle, window=2)
    with pytest.raises(UsageError, match="larger window"):
        session.generate(2, actions(2), schedule=Schedule.chained(LAYOUT, 1))


def test_a_session_is_closed_behind_the_pass_that_another_thread_runs(small_bundle: Path) -> None:
    session, found = started(small_bundle), list[Exception]()
    runs, goes_on, step = threading.Event(), threading.Event(), session.engine.step

    def slow(lanes: Sequence[int] = ()) -> None:
        runs.set()
        assert goes_on.wait(60)
        step(lanes)

    def decode() -> None:
        try:
            tokens(session, 2)
        except Exception as error:
            found.append(error)

    session.engine.step = slow  # type: ignore[method-assign]
    decodes, closes = threading.Thread(target=decode), threading.Thread(target=session.close)
    decodes.start()
    assert runs.wait(60)
    closes.start()
    closes.join(0.2)
    closed = session.closed
    assert not closed
    goes_on.set()
    for thread in (closes, decodes):
        thread.join(60)
    assert session.closed
    assert [type(error) for error in found] == [UsageError]
    session.close()
