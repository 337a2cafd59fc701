"""A session: one stream of frames, decoded step by step over one engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Manifest
from diagd.engines.engine import Engine, Float, Int, SamplingState, StepInputs
from diagd.errors import UsageError
from diagd.runtime.context import Refill, context_policy
from diagd.runtime.random import uniforms
from diagd.runtime.sampling import SamplingSettings, sample
from diagd.runtime.slots import SlotRing
from diagd.runtime.text import TextReader
from diagd.runtime.tokens import TokenPlaces
from diagd.schedule import NO_SINK, Schedule, StreamLayout, Table


@dataclass(frozen=True)
class Frame:
    """A decoded frame.

    Attributes:
        index: in the stream.
        tokens: int32 [rows, columns].
        steps: passes since the frame before.
        seconds: likewise, ``refill_seconds`` included.
        refill_steps: further passes that fed the context again because it slid.
        refill_seconds: what they took.
    """

    index: int
    tokens: Int
    steps: int
    seconds: float
    refill_steps: int = 0
    refill_seconds: float = 0.0


RECENT_STEPS: Final = 1 << 15


class StepTime(NamedTuple):
    """One step: when it began (``time.perf_counter``), its size, and the seconds of its parts.

    ``rows`` are fed, ``decoded`` of them predict a cell, ``live`` slots are in use. ``host`` is what is
    neither in the engine nor in the sampler of the host.
    """

    began: float
    rows: int
    decoded: int
    live: int
    engine: float
    sampling: float
    host: float


@dataclass
class Timing:
    """Seconds inside and outside the engine over all steps, and the last steps one by one.

    Passes that feed a slid context again are counted by themselves, as ``refill_steps`` and
    ``refill_seconds``.
    """

    steps: int = 0
    engine: float = 0.0
    host: float = 0.0
    refill_steps: int = 0
    refill_seconds: float = 0.0
    recent: deque[StepTime] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def add(self, step: StepTime) -> None:
        """Count a step."""
        self.steps += 1
        self.engine += step.engine
        self.host += step.host + step.sampling
        self.recent.append(step)


@dataclass(frozen=True)
class _Plan:
    """A table with everything that can be worked out before the first step."""

    table: Table
    sources: Int
    sinks: Int
    uniforms: Float
    ranges: Int
    transient: NDArray[np.bool_]
    frame_starts: dict[int, int]
    frame_ends: dict[int, int]


class Session:
    """Generates frames behind a prompt.

    Args:
        manifest: of the bundle.
        engine: compiled step graph over KV buffers large enough for ``window``.
        window: frames that a query may see, its own included; older ones are evicted.
        zero_slots: positions that start as visible zero rows (the released MineWorld code's cache).
        roll: frames by which a full window slides at once, for models that then feed it again; default: the
            manifest's.
        text: reads text, for models that attend to it.

    Raises:
        UsageError: ``roll`` does not fit the model or the window.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: Engine,
        window: int,
        zero_slots: bool = False,
        roll: int | None = None,
        text: TextReader | None = None,
    ) -> None:
        self.manifest, self.engine, self.window = manifest, engine, window
        self.layout: StreamLayout = manifest.layout
        self.timing = Timing()
        self._places = token_places(self.layout, window)
        zero_rows = (self.layout.frame_start(0), self.layout.frame_start(window)) if zero_slots else (0, 0)
        self._slots = SlotRing(engine.slot_position, zero_rows)
        self._context = context_policy(manifest.context, self.layout, window, self._slots, engine, roll)
        self._text = text
        self._known = self._fed = 0
        self._ranges = manifest.sampling.range_table(self.layout)
        shared = self._ranges[0]
        if (self._ranges == shared).all() and 0 <= shared[0] < shared[1] <= manifest.output_vocabulary:
            self._ranges = shared

    def start(self, frames: Int, actions: Int | None = None, text: Float | None = None) -> None:
        """Forget everything and take a prompt.

        Args:
            frames: int32 [P, rows, columns], P at least 1 and below the window.
            actions: int32 [P, n], ids of the known tokens leading to each prompt frame; row 0 only matters
                where known tokens precede the first frame. Not needed for models without actions.
            text: float32 [n, width], embeddings of the text, for models that attend to one.

        Raises:
            UsageError: shape or length does not fit the model, or it needs a text.
        """
        grid = (self.layout.rows, self.layout.columns)
        if frames.ndim != 3 or frames.shape[1:] != grid or not len(frames):
            raise UsageError(
                f"the prompt has shape {frames.shape}, this model takes [frames, {grid[0]}, {grid[1]}]"
            )
        if len(frames) >= self.window:
            raise UsageError(
                f"the prompt has {len(frames)} frames but the window holds {self.window} with the one to "
                f"decode; give at most {self.window - 1} frames or load with a larger window"
            )
        self._set_text(text)
        self._slots.reset()
        self._known = self._fed = 0
        self.engine.token_buffer[:] = 0
        self._put(0, np.asarray(self.manifest.layout.prefix_tokens, np.int32))
        for index, frame in enumerate(frames):
            self._put_actions(index, None if actions is None else actions[index])
            self._put(self.layout.first_cell(index), frame.reshape(-1))
        self._known = len(frames)

    def generate(
        self,
        frames: int,
        actions: Int | None = None,
        *,
        schedule: Schedule | None = None,
        sampling: SamplingSettings | None = None,
        seed: int = 0,
    ) -> Iterator[Frame]:
        """Decode frames behind what is known, yielding each when it is complete.

        Args:
            frames: how many.
            actions: int32 [frames, n], ids of the known tokens leading to each of them.
            schedule: decoding order; default: the manifest's.
            sampling: default: the manifest's.
            seed: of the random numbers; with the same engine, the same seed gives the same tokens.

        Raises:
            UsageError: there is no prompt, or actions are missing.
        """
        if not self._known:
            raise UsageError("a session needs a prompt; call start(frames, actions) first")
        schedule = schedule or self.manifest.schedule.schedule(self.layout)
        sampling = self._settings(sampling)
        if self.layout.gap and (actions is None or len(actions) != frames):
            raise UsageError(
                f"{frames} frames need actions of shape [{frames}, {self.layout.gap}], "
                f"got {'none' if actions is None else list(np.shape(actions))}"
            )
        in_flight = schedule.frames_in_flight
        if self.window < in_flight:
            raise UsageError(
                f"k={schedule.k}, d={schedule.d} has {in_flight} frames under way at once, the window holds "
                f"{self.window}; use a larger window or a larger d"
            )
        self._context.check(schedule, self._known + frames - 1)
        plan = self._plan(schedule, frames, seed)
        return self._decode(plan, actions, sampling, schedule.keep_seeds)

    def _settings(self, chosen: SamplingSettings | None) -> SamplingSettings:
        rules = self.manifest.sampling
        settings = chosen or SamplingSettings(rules.temperature, rules.top_k, rules.top_p)
        if 0 < settings.temperature < rules.minimum_temperature:
            return replace(settings, temperature=rules.minimum_temperature)
        return settings

    def _plan(self, schedule: Schedule, frames: int, seed: int) -> _Plan:
        table = schedule.table(self._known, frames, self._fed, self.engine.max_width)
        widest = int(table.widths.max())
        if widest > self.engine.max_width:
            raise UsageError(
                f"a step of k={schedule.k}, d={schedule.d} feeds {widest} tokens, graphs of this bundle take "
                f"up to {self.engine.max_width}; use a larger k or d, or export with --set widths={widest}"
            )
        offset = self.layout.prefix
        place = np.where(table.sinks == NO_SINK, 0, (table.sinks - offset) % self.layout.frame_length)
        return _Plan(
            table,
            self._places.of(table.sources),
            self._places.of(table.sinks),
            uniforms(seed, table.sinks.astype(np.int64)),
            self._ranges if self._ranges.ndim == 1 else self._ranges[place],
            table.sources != table.positions,
            {int(step): index for index, step in enumerate(table.frame_starts)},
            {int(step): index for index, step in enumerate(table.frame_ends)},
        )

    def _decode(
        self, plan: _Plan, actions: Int | None, sampling: SamplingSettings, keep_seeds: bool
    ) -> Iterator[Frame]:
        table, first = plan.table, plan.table.first_frame
        began, first_step, refilled = time.perf_counter(), 0, self._refilled
        if actions is not None:
            self._put_actions(first, actions[0])
        try:
            for step in range(table.steps):
                if (started := plan.frame_starts.get(step)) is not None:
                    ids = actions[started] if actions is not None else None
                    self._begin_frame(first + started, ids, int(table.step(step).positions.min()), sampling)
                self._run_step(plan, step, sampling, keep_seeds)
                if (ended := plan.frame_ends.get(step)) is None:
                    continue
                frame = self._complete(first + ended)
                steps, seconds = step + 1 - first_step, time.perf_counter() - began
                passes, spent = np.subtract(self._refilled, refilled)
                yield Frame(first + ended, frame, steps, seconds, int(passes), float(spent))
                began, first_step, refilled = time.perf_counter(), step + 1, self._refilled
        finally:
            # A caller may stop between chained frames: rows of frames that are not complete must go.
            self._slots.evict(self._fed, self._fed + 2 * self.window * self.layout.frame_length)

    def _complete(self, frame: int) -> Int:
        """Count a frame as known; all its tokens but the last one are in the cache."""
        self._known = frame + 1
        start = self.layout.first_cell(frame)
        self._fed = start + self.layout.cells - 1
        places = self._places.of(np.arange(start, start + self.layout.cells, dtype=np.int32))
        return self.engine.token_buffer[places].reshape(self.layout.rows, self.layout.columns)

    def _run_step(self, plan: _Plan, step: int, sampling: SamplingSettings, keep_seeds: bool) -> None:
        began = time.perf_counter()
        rows = slice(int(plan.table.offsets[step]), int(plan.table.offsets[step + 1]))
        positions = plan.table.positions[rows] - np.int32(self._slots.base)
        start = self._slots.append(positions, self.engine.padded_width(len(positions)))
        sinks = plan.sinks[rows]
        decoded = np.flatnonzero(plan.table.sinks[rows] != NO_SINK).astype(np.int32)
        draws = plan.uniforms[rows][decoded]
        inputs = StepInputs(plan.sources[rows], positions, sinks, decoded, draws, start, self._slots.live)
        state = SamplingState(sampling.temperature, sampling.top_k, sampling.top_p)
        entered = time.perf_counter()
        logits = self.engine.step(inputs, state)
        left = time.perf_counter()
        if not self.engine.samples_in_graph and len(decoded):
            ranges = plan.ranges if plan.ranges.ndim == 1 else plan.ranges[rows][decoded]
            self.engine.token_buffer[sinks[decoded]] = self._sample(logits, draws, sampling, ranges)
        sampled = time.perf_counter()
        if not keep_seeds:
            self._slots.void(start, np.flatnonzero(plan.transient[rows]))
        host = entered - began + time.perf_counter() - sampled
        width = len(positions), len(decoded), self._slots.live
        self.timing.add(StepTime(began, *width, left - entered, sampled - left, host))

    def _sample(self, logits: Float, draws: Float, sampling: SamplingSettings, ranges: Int) -> Int:
        """One token a row, of ids in ``ranges``: [R, 2], or [2] where all rows share one."""
        keep_crossing = self.manifest.sampling.keep_crossing
        if ranges.ndim == 2:
            low, high = ranges.T
            return sample(logits, draws, sampling, low=low, high=high, keep_crossing=keep_crossing)
        first, last = ranges
        tokens = sample(logits[:, first:last], draws, sampling, keep_crossing=keep_crossing)
        tokens += first
        return tokens

    @property
    def _refilled(self) -> tuple[int, float]:
        return self.timing.refill_steps, self.timing.refill_seconds

    def _begin_frame(self, frame: int, actions: Int | None, fed: int, sampling: SamplingSettings) -> None:
        """Take a frame's actions, and keep the context to the window."""
        if self.layout.gap and actions is not None:
            self._put_actions(frame, actions)
        refill = self._context.advance(frame, fed)
        if refill is not None:
            self._refill(refill, sampling)

    def _refill(self, refill: Refill, sampling: SamplingSettings) -> None:
        """Feed known tokens again, in passes as wide as the engine takes."""
        began, width = time.perf_counter(), self.engine.max_width
        state = SamplingState(sampling.temperature, sampling.top_k, sampling.top_p)
        nothing = np.zeros(0, np.int32)
        for first in range(0, len(refill.positions), width):
            positions = refill.positions[first : first + width]
            sources = self._places.of(refill.sources[first : first + width])
            sinks = self._places.of(np.full(len(positions), NO_SINK, np.int32))
            start = self._slots.append(positions, self.engine.padded_width(len(positions)))
            inputs = StepInputs(
                sources, positions, sinks, nothing, np.zeros(0, np.float32), start, self._slots.live
            )
            self.engine.step(inputs, state)
            self.timing.refill_steps += 1
        self.timing.refill_seconds += time.perf_counter() - began

    def _set_text(self, text: Float | None) -> None:
        if self._text is None:
            if text is not None:
                raise UsageError(f"{self.manifest.name} attends to no text; leave it out")
            return
        if text is None:
            spec = self._text.spec
            raise UsageError(
                f"{self.manifest.name} needs text embeddings [n, {spec.width}], n up to {spec.length}"
            )
        self.engine.set_text(self._text.rows(text))

    def _put_actions(self, frame: int, ids: Int | None) -> None:
        """Write the known tokens ahead of a frame; the first frame has only those of its own layout."""
        count = self.layout.before if frame == 0 else self.layout.gap
        if not count:
            return
        if ids is None or len(ids) < count:
            raise UsageError(
                f"frame {frame} needs {count} action tokens, got {0 if ids is None else len(ids)}"
            )
        self._put(self.layout.first_cell(frame) - count, np.asarray(ids)[-count:])

    def _put(self, position: int, ids: Int) -> None:
        places = self._places.of(np.arange(position, position + len(ids), dtype=np.int32))
        self.engine.token_buffer[places] = ids


def token_places(layout: StreamLayout, window: int) -> TokenPlaces:
    """Places for the window and the frames that seeds and chained frames reach beyond it."""
    return TokenPlaces(layout, window + 4)
