"""Sessions in lock step decode what each decodes alone, to the token, whatever the others do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import diagd
from diagd.bundle import Bundle, Form
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import PrefixEngine
from diagd.errors import UsageError
from diagd.export.options import GraphOptions
from diagd.runtime.decoders import Decoder, JacobiDecoder, ScheduledDecoder
from diagd.runtime.group import Group
from diagd.runtime.load import open_group
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.schedule import Schedule, StreamLayout
from tests.models import export_small
from tests.oracles.models import CODES, small_model
from tests.runtime.conftest import LAYOUT

SESSIONS, FRAMES = 3, 9  # the window of four frames slides
DECODERS: dict[str, Decoder] = {
    "next token": ScheduledDecoder(Schedule.next_token(LAYOUT)),
    "serial": ScheduledDecoder(Schedule.serial(LAYOUT, 1)),
    "chained": ScheduledDecoder(Schedule.chained(LAYOUT, 1)),
    "jacobi": JacobiDecoder(5),
    "jacobi, auto": JacobiDecoder(),
}
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(0, CODES, (1 + n, 4, 6)).astype(np.int32) for n in range(SESSIONS)]
ACTIONS = [RANDOM.integers(CODES, CODES + 6, (FRAMES + 3, 3)).astype(np.int32) for _ in range(SESSIONS)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small model in all forms, those of fixed widths with the streams of the group."""
    options = GraphOptions(tuple(Form), widths=(4, 16), streams=SESSIONS)
    path = tmp_path_factory.mktemp("streams") / "small.diagd"
    return Bundle.open(export_small(small_model(LAYOUT, context_frames=4), path, options))


@pytest.fixture(scope="module", params=Form)
def any_group(bundle: Bundle, request: pytest.FixtureRequest) -> Iterator[Group]:
    with open_group(bundle, SESSIONS, cpu=CpuOptions(1), form=request.param) as group:
        yield group


@pytest.fixture(scope="module")
def group(bundle: Bundle) -> Iterator[Group]:
    with diagd.load(bundle.path, threads=1, sessions=SESSIONS) as group:
        yield group


@pytest.fixture(scope="module")
def alone(bundle: Bundle) -> Iterator[Session]:
    with diagd.load(bundle.path, threads=1) as session:
        yield session


def start(session: Session, number: int) -> np.ndarray:
    """Take prompt ``number``; gives the actions behind it."""
    prompt = PROMPTS[number]
    session.start(prompt, ACTIONS[number][: len(prompt)])
    return ACTIONS[number][len(prompt) :][:FRAMES]


def by_itself(session: Session, number: int, decoder: Decoder, seed: int) -> list[list[list[int]]]:
    led = start(session, number)
    return [frame.tokens.tolist() for frame in session.frames(decoder, led, seed=seed)]


@pytest.mark.parametrize("name", DECODERS)
def test_tokens_are_those_of_a_session_alone(any_group: Group, alone: Session, name: str) -> None:
    group = any_group
    decoder = DECODERS[name]
    expected = [by_itself(alone, n, decoder, 7 * n) for n in range(SESSIONS)]
    led = [start(session, n) for n, session in enumerate(group.sessions)]
    found: list[list[list[list[int]]]] = [[] for _ in led]
    for number, frame in group.frames(led, decoder, seeds=[7 * n for n in range(SESSIONS)]):
        found[number].append(frame.tokens.tolist())
    assert found == expected
    assert expected[0] != expected[1]


def test_each_session_draws_by_its_own_rules(group: Group, alone: Session) -> None:
    rules = SamplingSettings(1.0, 5), SamplingSettings(1.0, 5), SamplingSettings(0.7, 0, 0.9)
    decoder, expected = DECODERS["serial"], []
    for n, sampling in enumerate(rules):
        led = start(alone, n)[:2]
        expected.append([f.tokens.tolist() for f in alone.frames(decoder, led, sampling=sampling, seed=n)])
    runs = {
        n: session.run(decoder, start(session, n)[:2], sampling=rules[n], seed=n)
        for n, session in enumerate(group.sessions)
    }
    found: list[list[list[list[int]]]] = [[] for _ in runs]
    for number, frame in group.together(runs):
        found[number].append(frame.tokens.tolist())
    assert found == expected


def test_passes_are_shared(group: Group) -> None:
    """In phase, a frame of all sessions takes the passes of one; those that feed prompts come on top."""
    steps = Schedule.serial(LAYOUT, 1).steps_per_frame
    for n, session in enumerate(group.sessions):
        start(session, n)
    passes = []
    run, group.passes.run = group.passes.run, lambda lanes: (passes.append(list(lanes)), run(lanes))[1]  # type: ignore[method-assign,func-returns-value]
    try:
        led = [actions[:3] for actions in ACTIONS]
        decoder = DECODERS["serial"]
        assert len(list(group.frames(led, decoder))) == 3 * SESSIONS
    finally:
        group.passes.run = run  # type: ignore[method-assign]
    together = [lanes for lanes in passes if sorted(lanes) == [0, 1, 2]]
    assert len(together) == 3 * steps
    assert len(passes) - len(together) <= SESSIONS


def test_joins_leaves_and_resets_change_nothing_for_the_others(any_group: Group, alone: Session) -> None:
    group = any_group
    decoder = DECODERS["serial"]
    expected = [by_itself(alone, n, decoder, n) for n in range(SESSIONS)]
    first, second, third = group.sessions
    led = [start(first, 0), start(second, 1), ACTIONS[2][3:]]
    first.stream.seed, second.stream.seed, third.stream.seed = 0, 1, 2
    found: list[list[list[list[int]]]] = [[], [], []]

    def go(*numbers: int) -> None:
        asked = {n: led[n][len(found[n])] for n in numbers}
        for number, frame in group.step(asked, decoder).items():
            found[number].append(frame.tokens.tolist())

    go(0, 1)
    go(0, 1)
    start(third, 2)  # joins
    third.stream.seed = 2
    for _ in range(3):
        go(2, 0)  # the second one waits meanwhile
    first.stream.rewind(2)
    del found[0][-2:]
    go(0, 1, 2)
    start(second, 1)  # anew
    second.stream.seed = 1
    found[1].clear()
    for _ in range(4):
        go(1, 2)
    third.close()  # leaves
    for _ in range(4):
        go(0, 1)
    assert [len(frames) for frames in found] == [8, 8, 8]
    assert found == [frames[:8] for frames in expected]


def test_a_session_that_never_ran_goes_on_from_a_snapshot(bundle: Bundle, alone: Session) -> None:
    led = start(alone, 0)
    frames = [frame.tokens for frame in alone.frames(DECODERS["serial"], led[:-1], seed=0)]
    snapshot = alone.stream.snapshot()
    expected = next(alone.frames(DECODERS["serial"], led[-1:], seed=0)).tokens
    assert len(frames) > 7  # rows that are seen depend on no more: positions are counted from a later frame
    with diagd.load(bundle.path, threads=1, sessions=SESSIONS) as fresh:
        fresh.sessions[1].stream.restore(snapshot)
        ((_, frame),) = fresh.frames({1: led[-1:]}, DECODERS["serial"], seeds={1: 0})
    assert np.array_equal(frame.tokens, expected)


def test_a_session_of_a_group_may_be_run_alone(any_group: Group, alone: Session) -> None:
    group = any_group
    decoder = DECODERS["chained"]
    for n, session in enumerate(group.sessions):
        assert by_itself(session, n, decoder, n) == by_itself(alone, n, decoder, n)


@pytest.mark.parametrize("name", ["serial", "jacobi"])
def test_a_run_that_waits_for_passes_of_a_session_run_otherwise_is_overtaken(group: Group, name: str) -> None:
    for n, session in enumerate(group.sessions):
        start(session, n)
    run = group.frames([ACTIONS[n][1 + n :][:3] for n in range(SESSIONS)], DECODERS[name])
    first, _ = next(run)
    frames = [group.sessions[n].step(ACTIONS[n][1 + n]) for n in range(SESSIONS) if n != first]
    assert [frame.index for frame in frames] == [1 + n for n in range(SESSIONS) if n != first]
    with pytest.raises(UsageError, match="this run was overtaken"):
        list(run)


def test_rows_of_nobody_go_where_nothing_is_seen(group: Group) -> None:
    engine = group.engine
    assert isinstance(engine, PrefixEngine)
    for n, session in enumerate(group.sessions):
        start(session, n)
    list(group.frames([ACTIONS[n][1 + n :][:1] for n in range(SESSIONS)], DECODERS["serial"]))
    live = engine._sent.live[1]
    kept = engine.rows("key_0", 1)[:live].copy()
    assert kept.any()
    list(group.sessions[0].frames(DECODERS["serial"], ACTIONS[0][2:3]))
    np.testing.assert_array_equal(engine.rows("key_0", 1)[:live], kept)


def test_sessions_that_take_part_in_no_pass_cost_nothing(group: Group, alone: Session) -> None:
    """Once a pass's worth was computed for nobody; who comes back goes on as alone."""
    engine, decoder = group.engine, DECODERS["next token"]
    assert isinstance(engine, PrefixEngine)
    expected = [by_itself(alone, n, decoder, n) for n in range(2)]
    led = [start(session, n) for n, session in enumerate(group.sessions[:2])]
    list(group.frames([actions[:2] for actions in led], decoder))
    run = group.sessions[0].steps(decoder, led[0][2:], seed=0)
    bound = [engine.outputs[1].shape()[1] for _ in run]
    assert bound == [2] + [1] * (len(bound) - 1)
    assert len(bound) >= (FRAMES - 2) * LAYOUT.cells
    back = group.sessions[1].frames(decoder, led[1][2:], seed=1)
    assert [frame.tokens.tolist() for frame in back] == expected[1][2:]


def test_passes_much_wider_than_frames_find_room(tmp_path: Path) -> None:
    """Of usual widths, over a grid so small that pad rows are most of what a pass writes."""
    options = GraphOptions((Form.PREFIX, Form.MODERN), streams=2)
    model = small_model(StreamLayout(2, 3, after=1), layers=1, context_frames=4)
    bundle = Bundle.open(export_small(model, tmp_path / "tiny.diagd", options))
    random = np.random.default_rng(0)
    cells, led = random.integers(0, CODES, (1, 2, 3)), random.integers(CODES, CODES + 6, (40, 1))
    found = []
    for form in options.forms:
        with open_group(bundle, 2, cpu=CpuOptions(1), form=form) as group:
            for session in group.sessions:
                session.start(cells, led[:1])
            frames = group.frames([led, led], DECODERS["jacobi"], sampling=SamplingSettings(0.0))
            found.append(sorted((n, frame.index, frame.tokens.tolist()) for n, frame in frames))
    assert found[0] == found[1] and len(found[0]) == 80


def test_what_cannot_be_shared_is_refused(bundle: Bundle, group: Group) -> None:
    with pytest.raises(UsageError, match=r"0 sessions are outside 1\.\.256"):
        diagd.load(bundle.path, sessions=0)
    with pytest.raises(UsageError, match=r"has 3 streams; export it again with --set streams=4"):
        open_group(bundle, 4, form=Form.MODERN)
    with pytest.raises(UsageError, match="no session has the number 3; this group has 3"):
        group.step({3: ACTIONS[0][0]})
    with pytest.raises(UsageError, match="no session has the number left; this group has 3"):
        group.step({"left": ACTIONS[0][0]})  # type: ignore[dict-item]
    for given in (3, np.array(3)):
        with pytest.raises(UsageError, match=r"3.* is one for no session; expected one for each"):
            group.step(given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="runs is 'x'; expected a Mapping"):
        list(group.together("x"))  # type: ignore[arg-type]


def test_seeds_may_be_an_array(group: Group) -> None:
    found = []
    for seeds in ([3, 4, 5], np.arange(3, 6)):
        led = [start(session, n)[:1] for n, session in enumerate(group.sessions)]
        made = group.frames(led, DECODERS["serial"], seeds=seeds)
        found.append(sorted((n, frame.tokens.tolist()) for n, frame in made))
    assert found[0] == found[1]


@pytest.mark.parametrize("used", ["write_slots", "write_tokens", "send", "step", "read_tokens"])
@pytest.mark.parametrize("sessions", [None, SESSIONS])
def test_an_engine_is_closed_behind_what_another_thread_does_with_it(
    bundle: Bundle, used: str, sessions: int | None
) -> None:
    """Its memory was gone under who had just begun a run: a KeyError, or worse on a device."""
    opened, found = diagd.load(bundle.path, threads=1, sessions=sessions), list[Exception]()
    engine, first = opened.engine, opened if isinstance(opened, Session) else opened.sessions[0]
    begins, goes_on, use = threading.Event(), threading.Event(), getattr(engine, used)
    led = start(first, 0)

    def slow(*given: object) -> object:
        begins.set()
        assert goes_on.wait(60)
        return use(*given)

    def decode() -> None:
        try:
            list(first.frames(None, led) if sessions is None else opened.frames({0: led}))  # type: ignore[arg-type]
        except Exception as error:
            found.append(error)

    setattr(engine, used, slow)
    decodes, closes = threading.Thread(target=decode), threading.Thread(target=opened.close)
    decodes.start()
    assert begins.wait(60)
    closes.start()
    closes.join(0.2)
    closed = opened.passes.closed
    assert not closed
    goes_on.set()
    for thread in (closes, decodes):
        thread.join(60)
    assert opened.passes.closed
    assert [type(error) for error in found] == [UsageError]
