"""Streams: without end, driven at the last moment, rewound, branched and restored, to the token."""

from __future__ import annotations

import copy
import gc
import io
import json
import multiprocessing
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diagd
from diagd.bundle import Form
from diagd.errors import UsageError
from diagd.export.options import GraphOptions
from diagd.runtime.decoders import Decoder, ForcedDecoder, JacobiDecoder, ScheduledDecoder
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.stream import Stream
from diagd.schedule import NO_SINK, RowSeed, Schedule, StreamLayout, slots_in_sight
from tests.models import export_small
from tests.oracles.models import CODES, small_model

SETTINGS = SamplingSettings(temperature=1.0, top_p=0.9)
LAYOUTS = {
    "rotary, actions after": StreamLayout(4, 6, after=3),
    "rotary, a prefix": StreamLayout(3, 4, prefix=1),
    "absolute, a prefix, actions before": StreamLayout(3, 4, prefix=1, before=1),
}


def orders(layout: StreamLayout) -> dict[str, Schedule]:
    k2 = Schedule.serial(layout, 2)
    return {
        "next token": Schedule.next_token(layout),
        "k=1 serial": Schedule.serial(layout, 1),
        "k=1 chained": Schedule.chained(layout, 1),
        "k=2 between": Schedule(layout, 2, (k2.d + 2 * layout.rows) // 2, RowSeed.ABOVE),
        "k=1, one ahead": Schedule(layout, 1, layout.rows + layout.columns - 2),
        "k=1 chained, prompt seeds": Schedule.chained(layout, 1, RowSeed.PROMPT),
        "k=2, seeds kept": Schedule(layout, 2, k2.d, RowSeed.DUPLICATE, refeed=False, keep_seeds=True),
    }


@pytest.fixture(scope="module", params=LAYOUTS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    absolute = request.param.startswith("absolute")
    model = small_model(LAYOUTS[request.param], layers=2, context_frames=4, rotary=not absolute)
    return export_small(model, tmp_path_factory.mktemp("stream") / "small.diagd")


def prompt(session: Session, frames: int = 2) -> None:
    layout, random = session.layout, np.random.default_rng(0)
    cells = random.integers(0, CODES, (frames, layout.rows, layout.columns)).astype(np.int32)
    session.start(cells, actions(layout, frames, 9))


def actions(layout: StreamLayout, frames: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).integers(CODES, CODES + 6, (frames, max(layout.gap, 1)))
    return drawn.astype(np.int32)[:, : layout.gap] if layout.gap else np.zeros((frames, 0), np.int32)


def decode(session: Session, order: Schedule, given: np.ndarray, seed: int = 5) -> np.ndarray:
    frames = session.frames(ScheduledDecoder(order), given, sampling=SETTINGS, seed=seed)
    return np.stack([frame.tokens for frame in frames])


def can_slide(session: Session, order: Schedule) -> bool:
    return order.d == order.steps_per_frame or session.manifest.context.kind == "rotary"


@pytest.mark.parametrize("name", orders(StreamLayout(3, 4)))
def test_the_blocks_of_a_flight_are_the_steps_of_its_table(bundle: Path, name: str) -> None:
    """Compiled for a frame and shifted, they are what the whole run's table says."""
    session = diagd.load(bundle, threads=1)
    layout, order, frames = session.layout, orders(session.layout)[name], 9
    prompt(session)
    if not can_slide(session, order):
        frames = 2
    table = order.table(2, frames, 0, session.engine.max_width)
    given, seen = actions(layout, frames), []
    for step, _ in session.steps(ScheduledDecoder(order), given, count=frames, sampling=SETTINGS):
        seen.append(step)
    assert len(seen) == table.steps
    for index, step in enumerate(seen):
        for ours, theirs in zip(step[:4], table.step(index)[:4], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("source", ["iterator", "callable", "one at a time"])
@pytest.mark.parametrize("name", ["k=1 serial", "k=1 chained"])
def test_an_action_given_at_the_last_moment_gives_the_tokens_of_one_given_ahead(
    bundle: Path, name: str, source: str
) -> None:
    session = diagd.load(bundle, threads=1)
    order, given = orders(session.layout)[name], actions(session.layout, 6)
    frames = 6 if can_slide(session, order) else 2
    given = given[:frames]
    prompt(session)
    expected = decode(session, order, given)
    prompt(session)
    pulled: list[tuple[int, int]] = []

    def pull(frame: int) -> np.ndarray:
        pulled.append((frame, session.stream.known))
        if frame - 2 >= frames:
            raise StopIteration
        made: np.ndarray = given[frame - 2]
        return made

    def iterate() -> Iterator[np.ndarray]:
        for frame in range(2, 2 + frames):
            yield pull(frame)

    decoder = ScheduledDecoder(order)
    if source == "one at a time" and name == "k=1 serial":
        seen = [
            session.step(pull(f), decoder, sampling=SETTINGS, seed=5).tokens for f in range(2, 2 + frames)
        ]
    else:
        actions_from = pull if source == "callable" else iterate()
        limit = frames if session.manifest.context.kind == "absolute" else None
        run = session.frames(decoder, actions_from, count=limit, sampling=SETTINGS, seed=5)
        seen = [frame.tokens for frame in run]
    np.testing.assert_array_equal(np.stack(seen), expected)
    # An action is pulled when its frame begins: never while more frames are under way than the order has.
    assert all(frame - known < order.frames_in_flight for frame, known in pulled)


def test_a_run_without_end_takes_the_same_memory_and_time(tmp_path: Path) -> None:
    """Twenty thousand frames of a tiny model: nothing is kept of what no query can reach."""
    layout = StreamLayout(1, 2, before=1)
    model = small_model(layout, layers=1, context_frames=3)
    session = diagd.load(export_small(model, tmp_path / "tiny.diagd"), threads=1)
    session.start(np.zeros((1, 1, 2), np.int32), np.full((1, 1), CODES, np.int32))
    sizes, spans, began = [], [], time.perf_counter()
    run = session.frames(ScheduledDecoder(Schedule.serial(layout, 1)), lambda _: np.array([CODES]), seed=1)
    for frame in run:
        if frame.index % 4000 == 0:
            gc.collect()
            sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            spans.append(time.perf_counter() - began)
            began = time.perf_counter()
        if frame.index == 20_000:
            break
    assert session.stream.known == 20_001
    assert sizes[-1] - sizes[0] < 3_000  # KB over 16,000 frames
    assert len(session.timing.recent) <= session.timing.recent.maxlen  # type: ignore[operator]
    print(f"seconds for 4,000 frames: {[round(span, 2) for span in spans]}")


@pytest.mark.parametrize("name", [*orders(StreamLayout(3, 4)), "jacobi"])
def test_the_cache_has_no_more_slots_in_use_than_can_be_in_sight(bundle: Path, name: str) -> None:
    """However long the stream: a prefix stays, and all else is written over once it has left the window."""
    session = diagd.load(bundle, threads=1)
    layout, frames = session.layout, 60
    order = None if name == "jacobi" else orders(layout)[name]
    prompt(session, 3)
    if order is not None and not can_slide(session, order):
        frames = 1
    decoder: Decoder = JacobiDecoder(7) if order is None else ScheduledDecoder(order)
    widest = max(step.width for step, _ in session.steps(decoder, actions(layout, frames), count=frames))
    assert session.stream.known == 3 + frames
    most = slots_in_sight(layout, session.window) + widest
    assert session._slots.live <= most
    for _ in range(frames // 3):  # overlapping frames come to an end again and again
        list(session.frames(decoder, actions(layout, 3), count=3))
    assert session._slots.live <= most + layout.frame_length


def test_a_run_that_was_overtaken_says_so(bundle: Path) -> None:
    session = diagd.load(bundle, threads=1)
    order = Schedule.chained(session.layout, 1)
    prompt(session)
    given = actions(session.layout, 2)
    first = session.frames(ScheduledDecoder(order), given, sampling=SETTINGS)
    next(first)
    clean = diagd.load(bundle, threads=1)
    prompt(clean)
    next(clean.frames(ScheduledDecoder(order), given, sampling=SETTINGS))
    serial = ScheduledDecoder(Schedule.serial(session.layout, 1))
    expected = next(clean.frames(serial, given[1:], sampling=SETTINGS)).tokens
    np.testing.assert_array_equal(next(session.frames(serial, given[1:], sampling=SETTINGS)).tokens, expected)
    with pytest.raises(UsageError, match="overtaken"):
        next(first)


@pytest.mark.parametrize("count", [-1, float("nan"), float("inf")])
def test_a_count_that_cannot_be_is_refused(bundle: Path, count: int) -> None:
    session = diagd.load(bundle, threads=1)
    prompt(session)
    with pytest.raises(UsageError, match="0 frames or more"):
        session.frames(None, lambda frame: actions(session.layout, 1)[0], count=count)
    assert not list(session.frames(None, actions(session.layout, 1), count=0))


@pytest.mark.parametrize("steps", [1, 7, 11])
@pytest.mark.parametrize(("name", "before"), [("k=1 serial", 0), ("k=1 serial", 13), ("k=1 chained", 0)])
def test_an_abandoned_run_leaves_no_guess_in_sight(bundle: Path, name: str, before: int, steps: int) -> None:
    """Neither where it stopped within a frame, nor where the next frame was under way already."""
    session, clean = (diagd.load(bundle, threads=1) for _ in range(2))
    order, given = orders(session.layout)[name], actions(session.layout, before + 3)
    for one in (session, clean):
        prompt(one, 1)
        if before:
            decode(one, order, given[:before])
    run = session.steps(ScheduledDecoder(order), given[before:], sampling=SETTINGS, seed=5)
    for _ in range(steps):
        next(run)
    if done := session.stream.known - clean.stream.known:
        decode(clean, order, given[before : before + done])
    serial = ScheduledDecoder(Schedule.serial(session.layout, 1))
    seen, expected = (
        [result.logits.copy() for _, result in one.steps(serial, given[:1], sampling=SETTINGS, seed=6)]
        for one in (session, clean)
    )
    for ours, theirs in zip(seen, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("back", [0, 1])
@pytest.mark.parametrize("name", ["k=1 chained", "k=1, one ahead"])
def test_a_full_window_goes_on_alike_here_and_elsewhere_behind_frames_that_others_overlapped(
    bundle: Path, name: str, back: int
) -> None:
    """Rows know nothing of the frames ahead, which evicted some, wherever those are given up."""
    session, elsewhere = (diagd.load(bundle, threads=1) for _ in range(2))
    order, given = orders(session.layout)[name], actions(session.layout, 9)
    if not can_slide(session, order):
        pytest.skip("flights end with the window")
    prompt(session)
    run = session.frames(
        ScheduledDecoder(order), lambda _: given[0], sampling=SETTINGS, count=8 if back else None
    )
    assert [next(run).index for _ in range(8)][-1] == 9
    session.stream.rewind(back)
    elsewhere.stream.restore(session.stream.snapshot())
    tokens, expected = (decode(one, orders(one.layout)["k=1 serial"], given) for one in (session, elsewhere))
    np.testing.assert_array_equal(tokens, expected)


def test_a_frame_is_taken_back_of_a_stream_whose_rows_were_built_and_that_did_not_go_on(bundle: Path) -> None:
    session, elsewhere = (diagd.load(bundle, threads=1) for _ in range(2))
    order, given = orders(session.layout)["k=2, seeds kept"], actions(session.layout, 16)
    prompt(session)
    decode(session, order, given[:-2])
    restored(session)
    session.frames(ScheduledDecoder(order), given[-2:])  # which nobody asks for a frame
    session.stream.rewind(1)
    elsewhere.stream.restore(session.stream.snapshot())
    seen, expected = (
        [result.logits.copy() for _, result in one.steps(ScheduledDecoder(order), given[:1], seed=6)]
        for one in (session, elsewhere)
    )
    for ours, theirs in zip(seen, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_ids_that_the_model_does_not_know_are_refused(bundle: Path) -> None:
    with diagd.load(bundle, threads=1) as session:
        prompt(session)
        known, layout = session.manifest.vocabulary, session.layout
        given: Any
        seed: Any
        wrong = np.full((1, layout.rows, layout.columns), known, np.int32)
        for ids in (wrong, wrong - known - 1):
            with pytest.raises(UsageError, match=f"the model knows 0..{known - 1}"):
                session.start(ids, actions(layout, 1))
        if layout.gap:
            before, two = session.stream.snapshot(), np.repeat(wrong - known, 2, axis=0)
            with pytest.raises(UsageError, match=r"action of frame \d+ has ids"):
                session.start(two, np.full((2, layout.gap), known, np.int32))
            assert session.stream.snapshot() == before
            with pytest.raises(UsageError, match=r"action of frame \d+ has ids"):
                next(session.frames(actions=np.full((1, layout.gap), known, np.int32)))
            for given in (1 << 32, 0.5, np.nan, "left"):
                with pytest.raises(UsageError, match="expected whole numbers"):
                    session.step(np.full(layout.gap, given))
            with pytest.raises(UsageError, match=f"needs {layout.gap} action tokens, got {layout.gap + 1}"):
                session.step(np.full(layout.gap + 1, known - 1))
        for given in (None, "left"):
            with pytest.raises(UsageError, match="expected whole numbers"):
                session.start(np.full_like(wrong, given, object), actions(layout, 1))
        for given in (Schedule.serial(layout, 1), "k=1"):
            with pytest.raises(UsageError, match=r"the decoder is .*; expected one such as"):
                session.step(actions(layout, 1)[0], given)
        for seed in ("1", 1.5):
            with pytest.raises(UsageError, match=f"seed is {seed!r}; expected an integer"):
                session.step(actions(layout, 1)[0], seed=seed)
    with pytest.raises(UsageError, match="the session is closed"):
        session.step(actions(layout, 1)[0])


Move = Callable[[Session], Session]


def rewound(session: Session) -> Session:
    decode(session, Schedule.serial(session.layout, 2), actions(session.layout, 5, 77), seed=77)
    session.stream.rewind(5)
    return session


def branched(session: Session) -> Session:
    branch = session.stream.branch()
    decode(session, Schedule.serial(session.layout, 2), actions(session.layout, 2, 77), seed=77)
    session.stream = branch
    return session


def restored(session: Session) -> Session:
    snapshot = session.stream.snapshot()
    assert len(snapshot) < 16_000
    prompt(session, 1)
    session.stream.restore(snapshot)
    return session


def put_aside(session: Session) -> Session:
    stream, given = session.stream, actions(session.layout, 2, 77)
    next(session.steps(ScheduledDecoder(Schedule.serial(session.layout, 2)), given))
    session.stream = stream.branch()
    prompt(session, 1)
    decode(session, Schedule.serial(session.layout, 2), given, seed=77)
    session.stream = stream
    return session


@pytest.mark.parametrize("move", [rewound, branched, restored, put_aside])
@pytest.mark.parametrize("before", [0, 2, 13])
@pytest.mark.parametrize("name", orders(StreamLayout(3, 4)))
def test_a_stream_that_was_moved_goes_on_to_the_token(
    bundle: Path, name: str, before: int, move: Move
) -> None:
    """Within the first window, where the ring has wrapped, and where frames were evicted and keys turned."""
    straight, moved = (diagd.load(bundle, threads=1) for _ in range(2))
    order = orders(straight.layout)[name]
    frames = 8
    if not can_slide(straight, order):
        before, frames = min(before, 1), 1
    given = actions(straight.layout, before + frames)
    for session in (straight, moved):
        prompt(session)
        if before:
            decode(session, order, given[:before])
    expected = decode(straight, order, given[before:])
    moved = move(moved)
    np.testing.assert_array_equal(decode(moved, order, given[before:]), expected)


@pytest.mark.parametrize("name", [*orders(StreamLayout(3, 4)), "jacobi"])
def test_a_known_prompt_is_not_fed_again(bundle: Path, name: str) -> None:
    """Nor what it has in common with the one before, but for rows that have left the window."""
    session, fresh = (diagd.load(bundle, threads=1) for _ in range(2))
    layout = session.layout
    jacobi = JacobiDecoder(5, draft=lambda stream: stream.frame(stream.begun - 2).reshape(-1))
    decoder = jacobi if name == "jacobi" else ScheduledDecoder(orders(layout)[name])
    most = 5 if decoder is jacobi or can_slide(session, orders(layout)[name]) else 1
    for turn, (known, frames, shared) in enumerate(
        [(2, 1, 0), (2, 1, 2), (1, 1, 1), (3, 1, 1), (3, most, 3), (3, 1, 0 if most > 1 else 3)]
    ):
        made, rows = [], []
        for one in (session, fresh):
            one.timing.recent.clear()
            fresh.stream.forget()
            prompt(one, known)
            led = actions(layout, frames, turn)
            run = one.frames(decoder, led, count=frames, sampling=SETTINGS, seed=turn)
            made.append([frame.tokens.tolist() for frame in run])
            rows.append(sum(step.rows for step in one.timing.recent))
        assert made[0] == made[1]
        assert rows[1] - rows[0] == (layout.first_cell(shared - 1) + layout.cells - 1 if shared else 0)


def test_frames_are_taken_back_as_far_as_rows_can_be_built_of_those_that_stay(bundle: Path) -> None:
    """And go on to the token; one more would not."""
    session, straight = (diagd.load(bundle, threads=1) for _ in range(2))
    order, given = Schedule.serial(session.layout, 1), actions(session.layout, 30)
    prompt(session)
    prompt(straight)
    decode(session, order, given)
    most = session.stream.spare(len(session.stream.past))
    assert most >= session.window
    with pytest.raises(UsageError, match=rf"back by {most + 1} frames: .* expected 0\.\.{most}"):
        session.stream.rewind(most + 1)
    session.stream.rewind(most)
    decode(straight, order, given[:-most])
    again, expected = (decode(one, order, given[-most:][:2]) for one in (session, straight))
    np.testing.assert_array_equal(again, expected)
    left = session.stream.past
    session.stream.return_to(session.stream.known, [left[-1]])  # less than that: no tokens are promised
    decode(session, order, given[:2])


def test_a_flight_stays_one_where_rows_are_built_again_from_its_middle(bundle: Path) -> None:
    """And later from ahead of it."""
    straight, moved = (diagd.load(bundle, threads=1) for _ in range(2))
    orders_of, given = orders(straight.layout), actions(straight.layout, 8)
    chained, serial = orders_of["k=1 chained"], orders_of["k=1 serial"]
    if not can_slide(straight, chained):
        pytest.skip("flights end with the window")
    for session in (straight, moved):
        prompt(session)
        decode(session, chained, given[:3])
        decode(session, serial, given[3:4])
    decode(moved, serial, given[4:7])
    restored(moved)
    decode(moved, serial, given[7:])
    moved.stream.rewind(4)
    seen, expected = (
        [result.logits.copy() for _, result in one.steps(ScheduledDecoder(serial), given[4:5], seed=6)]
        for one in (moved, straight)
    )
    for ours, theirs in zip(seen, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_stream_that_other_sessions_decoded_meanwhile_goes_on_to_the_token(bundle: Path) -> None:
    """As players change seats and come back; other engines know nothing of its first tokens, or theirs."""
    straight, here, there = (diagd.load(bundle, threads=1) for _ in range(3))
    names = [name for name, order in orders(here.layout).items() if can_slide(here, order)]
    for name in names:
        order, given = orders(here.layout)[name], actions(here.layout, 26)
        for session in (straight, here):
            prompt(session, 1)
        there.start(np.full((1, *here.stream.frame(0).shape), 3), actions(here.layout, 1, 8))
        decode(there, order, given[:1], seed=6)
        expected = [decode(straight, order, part) for part in (given[:20], given[20:22], given[22:])]
        tokens = [decode(here, order, given[:20])]
        overtaken = here.frames(ScheduledDecoder(order), given[20:])
        there.stream = here.stream
        tokens.append(decode(there, order, given[20:22]))
        with pytest.raises(UsageError, match="overtaken"):
            next(overtaken)
        tokens.append(decode(here, order, given[22:]))
        for ours, theirs in zip(tokens, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        there.stream = there.stream.branch()


@pytest.mark.parametrize("name", ["next token", "k=1 serial", "k=1 chained"])
def test_a_run_whose_stream_was_moved_under_it_says_so(bundle: Path, name: str) -> None:
    """It went on over rows of frames that had been taken back."""
    session = diagd.load(bundle, threads=1)
    order = orders(session.layout)[name]
    frames = 9 if can_slide(session, order) else 2
    moves: list[Callable[[Stream], None]] = [
        lambda stream: stream.rewind(1),
        lambda stream: stream.restore(stream.snapshot()),
        Stream.forget,
    ]
    for move in moves:
        prompt(session)
        run = session.frames(ScheduledDecoder(order), actions(session.layout, frames))
        next(run)
        move(session.stream)
        with pytest.raises(UsageError, match="overtaken"):
            next(run)


@pytest.mark.parametrize("passes", [0, 1])
def test_rows_that_were_not_built_to_the_end_are_built_again(
    bundle: Path, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where somebody interrupts it; the stream has all its frames, and streams put aside have theirs."""
    straight, session = (diagd.load(bundle, threads=1) for _ in range(2))
    order, given = Schedule.serial(session.layout, 1), actions(session.layout, 14)
    for one in (straight, session):
        prompt(one)
        decode(one, order, given[:9])
    first, moved = session.stream, session.stream.branch()
    session.stream = moved
    left, step = passes, session.engine.step

    def interrupted(lanes: Sequence[int] = (0,)) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        step(lanes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session.engine, "step", interrupted)
        decode(session, order, given[9:])
    assert moved.known == 11
    assert [past.tokens.tolist() for past in moved.past] == [past.tokens.tolist() for past in first.past]
    expected = decode(straight, order, given[9:])
    for stream in (first, moved):
        session.stream = stream
        np.testing.assert_array_equal(decode(session, order, given[9:]), expected)


def test_a_stream_is_restored_in_another_process(bundle: Path, tmp_path: Path) -> None:
    session = diagd.load(bundle, threads=1)
    order = Schedule.serial(session.layout, 1)
    given = actions(session.layout, 12)
    prompt(session)
    decode(session, order, given[:7])
    (tmp_path / "snapshot").write_bytes(session.stream.snapshot())
    np.save(tmp_path / "actions.npy", given[7:])
    expected = decode(session, order, given[7:])
    script = """
import sys, numpy as np, diagd
bundle, folder = sys.argv[1:]
session = diagd.load(bundle, threads=1)
session.stream.restore(open(f"{folder}/snapshot", "rb").read())
decoder = diagd.ScheduledDecoder(diagd.Schedule.serial(session.layout, 1))
actions = np.load(f"{folder}/actions.npy")
frames = session.frames(decoder, actions, sampling=diagd.SamplingSettings(1.0, 0, 0.9), seed=5)
np.save(f"{folder}/frames.npy", np.stack([frame.tokens for frame in frames]))
"""
    command = [sys.executable, "-c", script, str(bundle), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "frames.npy"), expected)


def changed(snapshot: bytes, **changes: Any) -> bytes:
    """A snapshot with another head or text, or ids that are larger."""
    arrays, target = dict(np.load(io.BytesIO(snapshot))), io.BytesIO()
    head = json.loads(bytes(arrays["head"]))
    for name, value in changes.items():
        if name in arrays:
            arrays[name] = value if name == "text" else arrays[name] + value
        else:
            head[name] = value
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    np.savez(target, **arrays)
    return target.getvalue()


def test_snapshots_of_something_else_are_refused(bundle: Path, tmp_path: Path) -> None:
    session = diagd.load(bundle, threads=1)
    for content in (b"", b"PK nothing", session.manifest.model_dump_json().encode()):
        with pytest.raises(UsageError, match="no snapshot of a stream"):
            session.stream.restore(content)
    other_layout = StreamLayout(2, 2, before=2)
    other = diagd.load(export_small(small_model(other_layout, layers=1), tmp_path / "other.diagd"), threads=1)
    other.start(np.zeros((1, 2, 2), np.int32), np.zeros((1, 2), np.int32))
    with pytest.raises(UsageError, match="this model's is"):
        session.stream.restore(other.stream.snapshot())
    with pytest.raises(UsageError, match="the stream has a window of"):
        session.stream = other.stream
    prompt(session)
    for changes, said in (
        ({"tokens": CODES}, r"snapshot has ids .*the model knows"),
        ({"known": 1}, "it has 2 of 1 frames"),
        ({"known": "two"}, "no snapshot of a stream"),
        ({"known": 1 << 60}, "it has 2 of 1152921504606846976 frames"),
        ({"prompt": None}, "no snapshot of a stream"),
        ({"seed": True}, "no snapshot of a stream"),
        ({"settings": [1.0, 0]}, "no snapshot of a stream"),
        ({"settings": [1e9, 0, 1.0]}, "temperature is 1000000000.0"),
        ({"first": 0.5}, "its first are float64, expected whole numbers"),
        ({"origin": 1j}, "its origin are complex128, expected whole numbers"),
        ({"order": 9}, r"its order are \[9, 9\], expected 0..0"),
        ({"counts": -9}, "its counts are .* expected 0.."),
        ({"text": np.full((1, 4), "a")}, "no snapshot of a stream"),
        ({"text": np.ones((1, 4), np.float32)}, "attends to no text"),
    ):
        with pytest.raises(UsageError, match=said):
            session.stream.restore(changed(session.stream.snapshot(), **changes))
            session.step(actions(session.layout, 1)[0])
        prompt(session)
    frames: Any
    for frames in (2, -1, 0.5):
        with pytest.raises(UsageError, match=f"cannot go back by {frames} frames"):
            session.stream.rewind(frames)


@pytest.mark.parametrize("name", ["k=1 serial", "k=1 chained"])
def test_a_stream_goes_on_where_int32_ends(bundle: Path, name: str) -> None:
    session = diagd.load(bundle, threads=1)
    layout, order, tokens = session.layout, orders(session.layout)[name], []
    if not can_slide(session, order):
        pytest.skip("flights end with the window")
    prompt(session)
    decode(session, order, actions(layout, 18))
    near, far = session.stream.snapshot(), ((1 << 31) // layout.frame_length - 20) // 12 * 12
    for snapshot in (near, changed(near, known=20 + far, origin=far)):
        session.stream.restore(snapshot)
        run = session.frames(ScheduledDecoder(order), actions(layout, 16), sampling=SamplingSettings(0.0))
        tokens.append([frame.tokens.tolist() for frame in run])
    assert session.stream.fed > 1 << 31
    if not layout.prefix or session.manifest.context.kind == "absolute":  # else it moves away from the prefix
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize("name", ["next token", "k=1 serial", "k=1 chained"])
def test_a_forced_run_predicts_what_the_run_it_follows_predicts(bundle: Path, name: str) -> None:
    """Given the tokens of another run ahead, or one step at a time, the logits are the same."""
    leading, following, ahead = (diagd.load(bundle, threads=1) for _ in range(3))
    order, given = orders(leading.layout)[name], actions(leading.layout, 2)
    for session in (leading, following, ahead):
        prompt(session)
    logits, others = [], []
    run = leading.steps(ScheduledDecoder(order), given, sampling=SETTINGS, seed=2)
    for (step, seen), (_, other) in zip(run, following.steps(ForcedDecoder(order), given), strict=True):
        following.stream.write(step.sinks[step.sinks != NO_SINK], seen.tokens)
        logits.append(seen.logits.copy())
        others.append(other.logits.copy())
    truth = [past.tokens for past in list(leading.stream.past)[-2:]]
    forced = [seen.logits.copy() for _, seen in ahead.steps(ForcedDecoder(order, truth), given)]
    for first, second, third in zip(logits, others, forced, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)
    np.testing.assert_array_equal(following.stream.past[-1].tokens, truth[-1])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_walk_of_moves_ends_where_its_log_replayed_ends(bundle: Path, data: st.DataObject) -> None:
    """Steps, rewinds and changes of order; then the tokens again from nothing, by what was kept."""
    session = diagd.load(bundle, threads=1)
    log: list[tuple[str, np.ndarray]] = []
    prompt(session)
    names = [name for name, order in orders(session.layout).items() if can_slide(session, order)]
    for turn in range(data.draw(st.integers(1, 8))):
        if len(log) > 0 and data.draw(st.booleans()):
            back = data.draw(st.integers(1, min(len(log), len(session.stream.past) - 2)))
            session.stream.rewind(back)
            del log[len(log) - back :]
        name = data.draw(st.sampled_from(names))
        given = actions(session.layout, 1, turn)
        decoder: Decoder = ScheduledDecoder(orders(session.layout)[name])
        seen = session.step(given[0], decoder, sampling=SETTINGS, seed=5).tokens
        log.append((name, given[0]))
    fresh = diagd.load(bundle, threads=1)
    prompt(fresh)
    for name, action in log:
        decoder = ScheduledDecoder(orders(fresh.layout)[name])
        again = fresh.step(action, decoder, sampling=SETTINGS, seed=5).tokens
    np.testing.assert_array_equal(again, seen)


def test_sessions_give_their_memory_back(bundle: Path) -> None:
    with diagd.load(bundle, threads=1) as session:
        prompt(session)
        run = session.frames(actions=actions(session.layout, 2))
        next(run)
    with pytest.raises(UsageError, match="overtaken"):
        next(run)


def test_threads_take_turns_at_a_session(bundle: Path) -> None:
    """As where a server waits no longer for a frame, which its thread decodes all the same."""
    with diagd.load(bundle, threads=1) as session:
        prompt(session)
        action = actions(session.layout, 1)[0]
        alone = [session.step(action, seed=3).tokens for _ in range(24)]
        prompt(session)
        with ThreadPoolExecutor(4) as pool:
            frames = list(pool.map(lambda _: session.step(action, seed=3), range(24)))
    for frame, tokens in zip(sorted(frames, key=lambda one: one.index), alone, strict=True):
        np.testing.assert_array_equal(frame.tokens, tokens)


def test_a_fork_of_the_process_refuses_its_session_and_lets_it_go(bundle: Path) -> None:
    """Threads are not forked with a process: one that waits for them waits for ever."""
    with diagd.load(bundle, threads=2) as session:
        prompt(session)

        def child() -> None:
            with pytest.raises(UsageError, match="before this process was forked"):
                session.step(actions(session.layout, 1))
            session.close()

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(300)
        process.kill()
        assert process.exitcode == 0


def test_what_cannot_be_copied_says_what_can(bundle: Path) -> None:
    with diagd.load(bundle) as session, diagd.load(bundle, sessions=2) as group:
        for opened in (session, group, group.sessions[1], [session]):
            for copied in (copy.deepcopy, pickle.dumps):
                with pytest.raises(UsageError, match=r"open one there .*session.stream.snapshot\(\)"):
                    copied(opened)


def test_tensors_of_pytorch_are_ids(bundle: Path) -> None:
    with diagd.load(bundle) as session, diagd.load(bundle) as other:
        layout = session.layout
        frames, led = np.zeros((1, layout.rows, layout.columns), np.int32), actions(layout, 3)
        session.start(frames, led[:1])
        tensor: Callable[[np.ndarray], Any] = torch.from_numpy
        other.start(tensor(frames), tensor(led[:1]))
        expected = [session.step(ids).tokens for ids in led]
        found = [other.step(ids).tokens for ids in tensor(led)]
        np.testing.assert_array_equal(found, expected)


def test_a_window_of_one_token_slides(tmp_path: Path) -> None:
    """Nothing is left to be fed again; each frame is what follows the one before."""
    model = small_model(StreamLayout(1, 1), layers=1, context_frames=2, rotary=False)
    session = diagd.load(export_small(model, tmp_path / "one.diagd"), threads=1)
    token, expected = np.zeros((1, 1, 1), np.int32), []
    for _ in range(4):
        session.start(token)
        token = session.step(sampling=SamplingSettings(0.0)).tokens[None]
        expected.append(token.item())
    session.start(np.zeros((1, 1, 1), np.int32))
    frames = session.frames(count=4, sampling=SamplingSettings(0.0))
    assert [frame.tokens.item() for frame in frames] == expected


def test_released_caches_are_refused_where_they_have_no_room(tmp_path: Path) -> None:
    layout = StreamLayout(3, 4, after=1)
    options = GraphOptions((Form.PORTABLE,), widths=(1, 16))
    path = export_small(small_model(layout, layers=1, context_frames=4), tmp_path / "p.diagd", options)
    with pytest.raises(UsageError, match=r"zero rows; the portable graph has \d+: use a smaller window"):
        diagd.load(path, compat="mineworld", threads=1)
