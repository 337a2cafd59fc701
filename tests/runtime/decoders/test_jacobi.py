"""Jacobi decoding is next-token prediction, token for token, whatever it guesses, however wide it looks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import diagd
from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import IdRange, SamplingRules
from diagd.engines.engine import VOID
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.export.options import GraphOptions
from diagd.runtime.decoders import (
    Decoder,
    ForcedDecoder,
    JacobiDecoder,
    RasterDecoder,
    ScheduledDecoder,
)
from diagd.runtime.decoders.jacobi import Draft
from diagd.runtime.load import open_session
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.step import Frame
from diagd.schedule import NO_SINK, Schedule, StreamLayout
from tests.models import export_small
from tests.oracles.models import CODES, small_model
from tests.runtime.test_stream import LAYOUTS, actions, prompt

FRAMES, SEED = 6, 5
SETTINGS = {
    "greedy": SamplingSettings(0.0),
    "T=0.7": SamplingSettings(0.7),
    "T=1, top-p": SamplingSettings(1.0, 0, 0.9),
    "T=1, top-k": SamplingSettings(1.0, 5),
    "T=1.5, both": SamplingSettings(1.5, 9, 0.8),
}
WINDOWS = (1, 2, 5, None)
FORMS = (Form.PREFIX, Form.MODERN, Form.PORTABLE)


@pytest.fixture(scope="module", params=LAYOUTS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    absolute = request.param.startswith("absolute")
    model = small_model(LAYOUTS[request.param], layers=2, context_frames=4, rotary=not absolute)
    options = GraphOptions(FORMS, widths=(1, 4, 16))
    return export_small(model, tmp_path_factory.mktemp("jacobi") / "small.diagd", options)


@pytest.fixture
def session(path: Path) -> Session:
    return diagd.load(path, threads=1)


def next_token(layout: StreamLayout) -> ScheduledDecoder:
    return ScheduledDecoder(Schedule.next_token(layout))


def decode(
    session: Session, decoder: Decoder, settings: SamplingSettings, frames: int = FRAMES
) -> tuple[np.ndarray, list[Frame]]:
    """Tokens [frames, rows, columns] behind two prompt frames: the window slides, more than once."""
    prompt(session)
    given = actions(session.layout, frames)
    seen = list(session.frames(decoder, given, count=frames, sampling=settings, seed=SEED))
    return np.stack([frame.tokens for frame in seen]), seen


def drafts(truth: np.ndarray) -> dict[str, Draft | None]:
    """Guesses that are usual, arbitrary, all right, and all wrong at every pass."""
    random, cells = np.random.default_rng(3), truth[0].size
    flat = truth.reshape(len(truth), -1)

    def of_frame(guess: Callable[[np.ndarray], np.ndarray]) -> Draft:
        return lambda stream: guess(flat[stream.begun - 3])

    return {
        "looked up": None,
        "previous": lambda stream: stream.frame(stream.known - 1).reshape(-1),
        "zeros": of_frame(np.zeros_like),
        "random": of_frame(lambda _: random.integers(0, CODES, cells).astype(np.int32)),
        "truth": of_frame(np.copy),
        "wrong": of_frame(lambda cells: (cells + 1) % CODES),
    }


def jacobi(window: int | None, draft: Draft | None) -> JacobiDecoder:
    return JacobiDecoder(window) if draft is None else JacobiDecoder(window, draft=draft)


@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_are_those_of_next_token_prediction(session: Session, settings: str) -> None:
    cells = session.layout.cells
    truth, _ = decode(session, next_token(session.layout), SETTINGS[settings])
    for window in (*WINDOWS, cells):
        for name, draft in drafts(truth).items() if window != 1 else [("looked up", None)]:
            tokens, frames = decode(session, jacobi(window, draft), SETTINGS[settings])
            np.testing.assert_array_equal(tokens, truth, err_msg=f"window {window}, draft {name}")
            assert all(frame.exact for frame in frames)
            passes = [frame.steps for frame in frames]
            assert max(passes) <= cells + 1  # each pass decides a cell; the prompt may take one of its own
            if window is not None and name == "truth":
                assert passes[1:] == [math.ceil(cells / window)] * (FRAMES - 1)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("window", [None, 5, 24])
def test_every_form_of_the_step_graph(path: Path, form: Form, window: int | None) -> None:
    settings = SETTINGS["T=1, top-p"]
    with open_session(Bundle.open(path), cpu=CpuOptions(1), form=form) as session:
        truth, _ = decode(session, next_token(session.layout), settings)
        for name, draft in drafts(truth).items():
            tokens, _ = decode(session, jacobi(window, draft), settings)
            np.testing.assert_array_equal(tokens, truth, err_msg=f"draft {name}")


@pytest.mark.parametrize("crossing", [True, False])
def test_ranges_of_single_cells_and_either_rule_of_top_p(path: Path, crossing: bool) -> None:
    ranges = (IdRange(low=2, high=CODES), IdRange(cell=1, low=0, high=3), IdRange(cell=7, low=20, high=CODES))
    rules = SamplingRules(ranges=ranges, keep_crossing=crossing)
    bundle = Bundle.open(path)
    manifest = bundle.manifest.model_copy(update={"sampling": rules})
    session = open_session(replace(bundle, manifest=manifest), cpu=CpuOptions(1))
    truth, _ = decode(session, next_token(session.layout), SETTINGS["T=1, top-p"])
    assert truth.reshape(FRAMES, -1)[:, 1].max() < 3
    for window in WINDOWS:
        tokens, _ = decode(session, JacobiDecoder(window), SETTINGS["T=1, top-p"])
        np.testing.assert_array_equal(tokens, truth)


def rows_by_position(session: Session) -> dict[int, list[np.ndarray]]:
    """K/V rows of the prefix form that queries see, by position in the stream."""
    slots, engine = session._slots, session.engine
    visible = np.flatnonzero(slots.slot_position != VOID)
    positions = (slots.slot_position[visible] + slots.base).tolist()
    assert len(set(positions)) == len(positions)
    buffers = engine.buffers.values()  # type: ignore[attr-defined]
    return {
        position: [buffer[slot] for buffer in buffers]
        for position, slot in zip(positions, visible, strict=True)
    }


def test_the_cache_holds_what_next_token_prediction_leaves(path: Path) -> None:
    """After every frame: the rows of committed tokens, and no others."""
    plain, session = diagd.load(path, threads=1), diagd.load(path, threads=1)
    settings, given = SETTINGS["T=1, top-p"], actions(plain.layout, FRAMES)
    prompt(plain)
    prompt(session)
    runs = (
        plain.frames(next_token(plain.layout), given, count=FRAMES, sampling=settings, seed=SEED),
        session.frames(JacobiDecoder(5), given, count=FRAMES, sampling=settings, seed=SEED),
    )
    for frame, _ in zip(*runs, strict=True):
        expected, found = rows_by_position(plain), rows_by_position(session)
        assert found.keys() == expected.keys()
        assert max(found) == plain.layout.first_cell(frame.index) + plain.layout.cells - 2
        for position, buffers in expected.items():
            for ours, theirs in zip(found[position], buffers, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_pass_writes_no_token_outside_its_frame(session: Session) -> None:
    decode(session, JacobiDecoder(5), SETTINGS["greedy"], 1)
    given, buffer = actions(session.layout, 1), session.engine.token_buffer  # type: ignore[attr-defined]
    before = buffer.copy()
    for step, _ in session.steps(JacobiDecoder(5), given, count=1, seed=SEED):
        changed = set(np.flatnonzero(buffer != before).tolist())
        frame = session.stream.begun - 1
        cells = session.stream.places.cells(frame)
        led = session.layout.gap
        assert changed <= set(range(cells.start - led, cells.stop))
        assert set(step.sinks.tolist()) - {NO_SINK} <= set(
            range(session.layout.first_cell(frame), session.layout.first_cell(frame) + session.layout.cells)
        )


def test_rows_have_the_bits_of_next_token_prediction_however_wide_their_pass(path: Path) -> None:
    """Once the ring has turned as well: what is summed lies in the same slots, in the same order."""
    seen: list[dict[int, np.ndarray]] = []
    for window in (1, 5, None):
        session = diagd.load(path, threads=1)
        prompt(session)
        logits: dict[int, np.ndarray] = {}
        decoder = next_token(session.layout) if window == 1 else JacobiDecoder(window)
        for step, result in session.steps(decoder, actions(session.layout, 20), count=20, seed=SEED):
            cells = step.sinks[step.sinks != NO_SINK].tolist()
            logits |= dict(zip(cells, result.logits.copy(), strict=True))
        seen.append(logits)
    for other in seen[1:]:
        for cell, row in seen[0].items():
            np.testing.assert_array_equal(row, other[cell])


def rewound(session: Session) -> None:
    list(session.frames(JacobiDecoder(3), actions(session.layout, 5, 77), count=5, seed=77))
    session.stream.rewind(5)


def branched(session: Session) -> None:
    branch = session.stream.branch()
    list(session.frames(JacobiDecoder(3), actions(session.layout, 2, 77), count=2, seed=77))
    session.stream = branch


def left_midway(session: Session) -> None:
    """Two passes into a frame, guesses in the cache."""
    steps = session.steps(JacobiDecoder(4), actions(session.layout, 1, 77), count=1, seed=77)
    next(steps)
    next(steps)


@pytest.mark.parametrize("move", [rewound, branched, left_midway])
@pytest.mark.parametrize("before", [0, 2, 13])
def test_a_stream_that_was_moved_goes_on_to_the_token(
    path: Path, before: int, move: Callable[[Session], None]
) -> None:
    settings = SETTINGS["T=1, top-p"]
    straight, moved = diagd.load(path, threads=1), diagd.load(path, threads=1)
    given = actions(straight.layout, before + FRAMES)
    for session, decoder in ((straight, next_token(straight.layout)), (moved, JacobiDecoder(5))):
        prompt(session)
        list(session.frames(decoder, given[:before], count=before, sampling=settings, seed=SEED))
    move(moved)
    runs = [
        session.frames(decoder, given[before:], count=FRAMES, sampling=settings, seed=SEED)
        for session, decoder in ((straight, next_token(straight.layout)), (moved, JacobiDecoder(5)))
    ]
    for ours, theirs in zip(*runs, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_schedules_go_on_behind_it_as_behind_next_token_prediction(path: Path) -> None:
    settings = SETTINGS["T=1, top-p"]
    seen = []
    for window in (None, 4):
        session = diagd.load(path, threads=1)
        first = next_token(session.layout) if window is None else JacobiDecoder(window)
        prompt(session)
        given = actions(session.layout, 2 * FRAMES)
        list(session.frames(first, given[:FRAMES], count=FRAMES, sampling=settings, seed=SEED))
        diagonal = ScheduledDecoder(Schedule.serial(session.layout, 1))
        run = session.frames(diagonal, given[FRAMES:], count=FRAMES, sampling=settings, seed=SEED)
        seen.append(np.stack([frame.tokens for frame in run]))
    np.testing.assert_array_equal(seen[0], seen[1])


def test_a_frame_that_a_deadline_ends_says_so_and_the_next_one_stands_on_it(path: Path) -> None:
    """Rows of the cells that were guessed are fed as they were shown."""
    settings, window = SETTINGS["T=1, top-p"], 2
    session = diagd.load(path, threads=1)
    tokens, frames = decode(session, JacobiDecoder(window, deadline=1e-9), settings)
    assert not any(frame.exact for frame in frames)
    assert {frame.steps for frame in frames[1:]} == {2}  # one, and one that feeds what was guessed
    fresh = diagd.load(path, threads=1)
    fresh.stream.restore(session.stream.snapshot())
    np.testing.assert_array_equal(fresh.stream.past[-1].tokens, tokens[-1])
    runs = [
        one.frames(JacobiDecoder(5), actions(one.layout, 3, 8), count=3, sampling=settings, seed=SEED)
        for one in (session, fresh)
    ]
    for ours, theirs in zip(*runs, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        assert ours.exact


def test_schedules_are_exact_where_they_are_next_token_prediction(session: Session) -> None:
    for decoder, exact in (
        (next_token(session.layout), True),
        (ScheduledDecoder(Schedule.serial(session.layout, 1)), False),
    ):
        _, frames = decode(session, decoder, SETTINGS["greedy"], 2)
        assert [frame.exact for frame in frames] == [exact, exact]


def test_a_bundle_may_decode_by_it_where_nothing_else_is_said(session: Session) -> None:
    truth, _ = decode(session, next_token(session.layout), SETTINGS["T=1, top-p"])
    manifest = session.manifest.model_copy(update={"decoder": "jacobi"})
    other = Session(manifest, session.engine, session.window)
    prompt(other)
    given = actions(other.layout, FRAMES)
    run = list(other.frames(None, given, count=FRAMES, sampling=SETTINGS["T=1, top-p"], seed=SEED))
    np.testing.assert_array_equal(np.stack([frame.tokens for frame in run]), truth)
    assert all(frame.exact for frame in run)


def test_tokens_that_no_frame_has_are_named(small_bundle: Path) -> None:
    session = diagd.load(small_bundle, threads=1)
    cells, order = session.layout.cells, Schedule.serial(session.layout, 1)
    for given, message in (
        (np.zeros(3, np.int32), f"frame 1 has 3 tokens; give {cells} a frame"),
        (np.full(cells, 1 << 20), "frame 1 has ids 1048576..1048576; the model knows"),
        (np.full(cells, 0.5), "expected whole numbers"),
        (None, f"frame 1 has 0 tokens; give {cells} a frame"),
    ):
        truth = [] if given is None else [given]
        guessing = JacobiDecoder(draft=lambda stream, given=given: given)  # type: ignore[misc]
        for decoder in (guessing, ForcedDecoder(order, truth), RasterDecoder(truth)):
            session.start(np.zeros((1, 4, 6), np.int32), np.full((1, 3), CODES))
            with pytest.raises(UsageError, match=message):
                session.step(np.full(3, CODES), decoder)


def test_windows_and_deadlines_that_decide_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="a window of 0 rows"):
        JacobiDecoder(0)
    with pytest.raises(UsageError, match=r"a deadline of 0\.0 s"):
        JacobiDecoder(deadline=0.0)


def test_one_decoder_serves_streams_of_any_grid(tmp_path: Path) -> None:
    decoder = JacobiDecoder()
    for layout in (StreamLayout(2, 2, before=1), StreamLayout(3, 3, before=1)):
        model = small_model(layout, layers=1, context_frames=3)
        session = diagd.load(export_small(model, tmp_path / f"{layout.rows}.diagd"), threads=1)
        session.start(np.zeros((1, layout.rows, layout.columns), np.int32), np.full((1, 1), CODES, np.int32))
        assert session.step(np.array([CODES]), decoder, seed=1).exact


@pytest.mark.parametrize(("after", "widest"), [(1, 256), (2, 256), (3, 256), (2, 2)])
def test_a_newer_action_begins_a_frame_anew(session: Session, after: int, widest: int) -> None:
    """Its tokens are those of a frame that began with it, wherever it came, however narrow a pass is."""
    session.engine.max_width = widest
    settings, layout = SETTINGS["T=1, top-p"], session.layout
    given, other = actions(layout, FRAMES), actions(layout, FRAMES, seed=8)
    passes = {"asked": 0, "frame": -1}

    def newer(frame: int) -> np.ndarray | None:
        passes.update(frame=frame, asked=1 if passes["frame"] != frame else passes["asked"] + 1)
        return other[frame - 2] if passes["asked"] == after else None

    prompt(session)
    run = session.frames(JacobiDecoder(2), given, count=FRAMES, sampling=settings, seed=SEED, newer=newer)
    seen = [frame.tokens for frame in run]
    np.testing.assert_array_equal(session.stream.past[-1].actions, other[-1])
    session.engine.max_width = 256
    prompt(session)
    run = session.frames(next_token(layout), other, count=FRAMES, sampling=settings, seed=SEED)
    np.testing.assert_array_equal(seen, [frame.tokens for frame in run])


def test_an_action_that_never_rests_lets_frames_end(session: Session) -> None:
    given = actions(session.layout, FRAMES)
    asked = []

    def newer(frame: int) -> np.ndarray:
        asked.append(frame)
        made: np.ndarray = given[0]
        return made

    prompt(session)
    for _ in session.frames(JacobiDecoder(2), given, count=FRAMES, seed=SEED, newer=newer):
        pass
    assert asked == list(range(2, 2 + FRAMES))
