"""Runs one decoder and keeps every time, by the host's clock or the engine's."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain, repeat
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from diagd.engines.engine import Float, Int
from diagd.runtime.actions import encode
from diagd.runtime.decoders import Decoder, ScheduledDecoder
from diagd.runtime.pixels import PixelCodec, Pixels
from diagd.runtime.session import Session
from diagd.runtime.step import Result, StepTime
from diagd.runtime.video import VideoWriter
from diagd.schedule import Schedule, Step


class Event(NamedTuple):
    """Work of one stage: when it began (``time.perf_counter``), its seconds, and what to know of it."""

    stage: str
    began: float
    seconds: float
    details: dict[str, float]


@dataclass
class Timeline:
    """Events that do not overlap, so that the stages of a run add up to its wall time."""

    events: list[Event] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, began, time.perf_counter() - began)

    def add(self, name: str, began: float, seconds: float, **details: float) -> None:
        """Add an event that was timed elsewhere."""
        self.events.append(Event(name, began, seconds, details))

    def seconds(self) -> dict[str, list[float]]:
        """Seconds of every event, by stage, in the order of first appearance."""
        stages: dict[str, list[float]] = {}
        for event in self.events:
            stages.setdefault(event.stage, []).append(event.seconds)
        return stages


class StepClock:
    """Times of the steps of one run, asked for whenever all of them are done.

    Of an engine that runs ahead, stamps around every pass say when it began and ended; they are set on the
    host's clock by one stamp that both wait for. A step's ``host`` is then how long the engine waited for
    the next pass.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._clock = session, session.engine.clock
        self._fed = session.timing.refill_seconds
        self._steps: list[StepTime] = []
        self._stamps: list[int] = []
        self._refills: list[tuple[float, float]] = []
        if session.engine.ahead:
            self._clock.mark(0)
            self._clock.seconds(0, 0)
            self._origin = time.perf_counter()

    def add(self, step: StepTime) -> None:
        """Count the step that the session just ran, or queued."""
        if (following := self._session.passes.stamps) is not None:
            self._stamps.append(following - 2)
        elif (fed := self._session.timing.refill_seconds) > self._fed:
            self._refills.append((step.began - (fed - self._fed), fed - self._fed))
            self._fed = fed
        self._steps.append(step)

    def finished(self) -> tuple[list[StepTime], list[tuple[float, float]]]:
        """Steps since it was asked last, and when feeding the context again began and what that took."""
        steps, refills, stamps = self._steps, self._refills, self._stamps
        if self._session.passes.stamps is not None:
            steps = [self._time(at, step) for at, step in zip(stamps, steps, strict=True)]
            refills = self._passes_between(stamps)
            self._session.passes.stamps = 1
        self._steps, self._refills, self._stamps = [], [], []
        return steps, refills

    def _time(self, at: int, noted: StepTime) -> StepTime:
        last = at + 2 == self._session.passes.stamps
        waited = 0.0 if last else self._clock.seconds(at + 1, at + 2)
        taken = self._clock.seconds(at, at + 1)
        return noted._replace(began=self._began(at), engine=taken, sampling=0.0, host=max(0.0, waited))

    def _passes_between(self, stamps: list[int]) -> list[tuple[float, float]]:
        """Passes with stamps that no step has: those that fed the context again, each group as one."""
        found, expected = [], 1
        for at in stamps:
            if at > expected:
                passes = sum(self._clock.seconds(number, number + 1) for number in range(expected, at, 2))
                found.append((self._began(expected), passes))
            expected = at + 2
        return found

    def _began(self, at: int) -> float:
        return self._origin + self._clock.seconds(0, at)


@contextmanager
def step_clock(session: Session) -> Iterator[StepClock]:
    """A clock over the steps that a session runs while the block does."""
    clock = StepClock(session)
    session.passes.stamps = 1 if session.engine.ahead else None
    try:
        yield clock
    finally:
        session.passes.stamps = None


ENCODE: Final = "video encode"
HANDLING: Final = "frame handling"

SECONDS: Final = 0.5
"""Between two reports of progress."""

Steps = Iterator[tuple[Step, Result]]


@dataclass
class Measured:
    """One run. Times are of one clock (``time.perf_counter``).

    Attributes:
        steps: every step; the first ``chunks`` and the one behind them feed the prompt.
        first_steps: number of the first step of each frame.
        decoded, shown: when each frame's last token was there, and when its picture was.
    """

    decoder: Decoder
    timeline: Timeline = field(default_factory=Timeline)
    began: float = 0.0
    ended: float = 0.0
    steps: list[StepTime] = field(default_factory=list)
    first_steps: list[int] = field(default_factory=list)
    decoded: list[float] = field(default_factory=list)
    shown: list[float] = field(default_factory=list)

    @property
    def schedule(self) -> Schedule | None:
        """Of the decoder, where it has one."""
        return self.decoder.schedule if isinstance(self.decoder, ScheduledDecoder) else None

    @property
    def frames(self) -> int:
        """Frames decoded."""
        return len(self.decoded)

    @property
    def chunks(self) -> int:
        """Steps ahead of the one that decodes the first cell."""
        return next(number for number, step in enumerate(self.steps) if step.decoded)

    def taken(self, frame: int) -> float:
        """When a frame's action was taken: at the start of its first step."""
        return self.steps[max(self.first_steps[frame], self.chunks)].began


def name_of(decoder: Decoder) -> str:
    """As it is spelled."""
    if isinstance(decoder, ScheduledDecoder):
        return decoder.schedule.name
    return type(decoder).__name__.removesuffix("Decoder").lower()


@dataclass(frozen=True)
class Workload:
    """What is fed: prompt tokens [P, h, w], its actions, those of the frames to come, and a text."""

    prompt: Int
    prompt_actions: Int | None
    actions: Int | None
    text: Float | None

    def start(self, session: Session, frames: int) -> Int | None:
        """Start a session at the prompt, to be fed; gives the actions of so many frames."""
        session.stream.forget()
        session.start(self.prompt, self.prompt_actions, self.text)
        return None if self.actions is None else self.actions[:frames]


def random_workload(session: Session, prompt: int, frames: int, seed: int = 0) -> Workload:
    """Random visual tokens that the model may see, no-op actions, and an empty text."""
    layout, manifest, random = session.layout, session.manifest, np.random.default_rng(seed)
    low, high = np.moveaxis(manifest.cell_ranges, -1, 0)
    tokens = random.integers(low, high, (prompt, *low.shape), dtype=np.int32)
    text = None if manifest.text is None else np.zeros((1, manifest.text.width), np.float32)
    if not layout.gap:
        return Workload(tokens, None, None, text)
    codec = manifest.actions
    idle = np.zeros(layout.gap, np.int32) if codec is None else np.asarray(encode(codec, {}), np.int32)
    return Workload(tokens, np.tile(idle, (prompt, 1)), np.tile(idle, (frames, 1)), text)


def measure(
    session: Session,
    decoder: Decoder,
    workload: Workload,
    frames: int,
    pixels: PixelCodec | None = None,
    video: Path | None = None,
    *,
    advance: Callable[[int], object] = lambda _: None,
    marks: bool = False,
) -> Measured:
    """Decode ``frames`` frames behind a prompt, to pixels and into a video where they are given.

    ``advance`` is called now and then with how many steps have run since its last call; with ``marks`` every
    step of a schedule is an NVTX range, where nvtx is installed.
    """
    run = Measured(decoder, began=time.perf_counter())
    with run.timeline.stage("prompt"):
        actions = workload.start(session, frames)
    with run.timeline.stage("plan"):
        by_frame = session.frame_steps(decoder, actions, count=frames)
        widths = _widths_by_frame(session, decoder, len(workload.prompt), frames) if marks else []
    marked = map(nvtx_ranges, by_frame, chain(widths, repeat([])))
    latest: list[Int] = []
    pictures = None if pixels is None else pixels.stream(latest[0] for _ in repeat(None))
    with step_clock(session) as clock, ExitStack() as opened:
        writer = None
        if pixels is not None and video is not None:  # its opening and closing count as encoding
            with run.timeline.stage(ENCODE):
                writer = opened.enter_context(VideoWriter(video, 10.0, pixels.spec.size, pixels.mark))
        for tokens in _frames(session, marked, run, clock, advance):
            latest[:] = [tokens]
            _show(run, pictures, writer)
            run.shown.append(time.perf_counter())
        if writer is not None:
            with run.timeline.stage(ENCODE):
                opened.close()
    run.ended = time.perf_counter()
    _add_steps(run)
    return run


def _widths_by_frame(session: Session, decoder: Decoder, known: int, frames: int) -> list[list[int]]:
    """Rows of the steps that end with each frame, where a schedule says them beforehand."""
    if not isinstance(decoder, ScheduledDecoder):
        return []
    schedule = decoder.schedule
    widths = schedule.table(known, frames, 0, session.engine.max_width).widths
    first = len(widths) - (frames - 1) * schedule.d
    return [part.tolist() for part in np.split(widths, range(first, len(widths), schedule.d))]


def nvtx_ranges(steps: Steps, widths: Iterable[int]) -> Steps:
    """The same steps, each within a range of Nsight Systems that says its ``widths``, where nvtx is there."""
    if find_spec("nvtx") is not None:
        nvtx = importlib.import_module("nvtx")
        for width in widths:
            with nvtx.annotate(f"step w={width}"):
                step = next(steps)
            yield step
    yield from steps


def _frames(
    session: Session,
    by_frame: Iterator[Steps],
    run: Measured,
    clock: StepClock,
    advance: Callable[[int], object],
) -> Iterator[Int]:
    """Tokens [rows, columns] of each frame as soon as they are there, and what it took beside its steps.

    Steps are reported now and then: a call for every one would be part of the run's time.
    """
    stream, asked = session.stream, time.perf_counter()
    known, begun, count, reported, told = stream.known, stream.begun, 0, asked, 0
    for steps in by_frame:
        for _, result in steps:
            run.first_steps += [count] * (stream.begun - begun)
            begun, count = stream.begun, count + 1
            clock.add(result.time)
            if result.time.began > reported + SECONDS:
                advance(count - told)
                reported, told = result.time.began, count
        for frame in range(known, stream.known):
            decoded = time.perf_counter()
            run.decoded.append(decoded)
            _add_frame(run, clock, asked, decoded)
            yield stream.frame(frame)
            asked = time.perf_counter()
        known = stream.known
    advance(count - told)


def _add_frame(run: Measured, clock: StepClock, asked: float, decoded: float) -> None:
    """Count the steps of a frame, and as its handling what is neither in them nor in a context fed again."""
    steps, refills = clock.finished()
    run.steps += steps
    inside = sum(step.seconds for step in steps)
    for began, seconds in refills:
        run.timeline.add("context refill", began, seconds)
        inside += seconds
    rest = max(0.0, time.perf_counter() - asked - inside)
    run.timeline.add(HANDLING, decoded - rest, rest)


def _show(run: Measured, pictures: Iterator[Pixels] | None, writer: VideoWriter | None) -> None:
    if pictures is None:
        return
    with run.timeline.stage("pixel decode"):
        images = next(pictures)
    if writer is not None:
        with run.timeline.stage(ENCODE):
            for image in images:
                writer.write(image)


def _add_steps(run: Measured) -> None:
    """Put the steps on the timeline: the engine by width, then sampling, then the host's own work.

    What lies between two stages is handling too: all of them add up to the run.
    """
    for index, step in enumerate(run.steps):
        name = "prefill" if index <= run.chunks else f"steps {bucket(step.rows)}"
        run.timeline.add(name, step.began, step.engine, rows=step.rows, live=step.live)
        run.timeline.add("sampling", step.began + step.engine, step.sampling)
        run.timeline.add("schedule", step.began + step.engine + step.sampling, step.host)
    rest = max(0.0, run.ended - run.began - sum(event.seconds for event in run.timeline.events))
    run.timeline.add(HANDLING, run.ended - rest, rest)


def bucket(rows: int) -> str:
    """Name of the bucket of a width: 1, 2, then up to each power of two."""
    if rows <= 2:
        return f"w={rows}"
    high = 1 << (rows - 1).bit_length()
    return f"w={high // 2 + 1}-{high}"
