"""A session: a stream of frames, decoded step by step over one engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, groupby, islice
from types import TracebackType

import numpy as np

from diagd.bundle import Manifest
from diagd.engines.engine import Engine, Float, Int, Steps
from diagd.engines.noise import check_seed
from diagd.errors import UsageError
from diagd.runtime.action_law import ActionLaw
from diagd.runtime.context import Refill, context_policy
from diagd.runtime.decoders.acting import ActingDecoder
from diagd.runtime.decoders.decoder import Decoder
from diagd.runtime.decoders.forced import ForcedDecoder, RasterDecoder
from diagd.runtime.decoders.jacobi import JacobiDecoder
from diagd.runtime.decoders.scheduled import ScheduledDecoder
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.slots import SlotRing
from diagd.runtime.step import Frame, Result, StepTime, Timing
from diagd.runtime.stream import Actions, Ids, Past, Stream, token_places
from diagd.runtime.text import TextReader
from diagd.schedule import Block, Schedule, Step, StreamLayout, feed, slots_in_sight

__all__ = ["Frame", "Session", "StepTime", "Timing", "token_places"]


class Session:
    """Decodes a stream over one engine, whose K/V rows it keeps in step with it.

    Args:
        manifest: of the bundle.
        engine: compiled step graph over KV buffers large enough for ``window``; closed with the session.
        window: frames that a query may see, its own included; older ones are evicted.
        zero_slots: positions that start as visible zero rows (the released MineWorld code's cache).
        roll: frames by which a full window slides at once, for models that then feed it again; default: the
            manifest's.
        text: reads text, for models that attend to it.

    Attributes:
        timing: of all passes so far.
        stamps: the number of the next time stamp on the engine's clock, which gets one ahead of every pass
            and one behind it while this is not None.

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
        self.stamps: int | None = None
        zero_rows = (self.layout.frame_start(0), self.layout.frame_start(window)) if zero_slots else (0, 0)
        self._slots = SlotRing(engine.capacity, zero_rows, slots_in_sight(self.layout, window))
        self._context = context_policy(
            manifest.context, self.layout, window, manifest.cache, self._slots, engine, roll
        )
        prefix = np.asarray(self.layout.prefix_tokens, np.int32)
        self._stream = Stream(self.layout, prefix, window, self._padded(), self._context.history)
        self._cached: tuple[Stream, int] | None = None  # whose rows the engine holds
        self._text, self._law = text, ActionLaw.of(manifest)
        self._run = self._prepared = 0
        self._left: Iterator[tuple[Block, int, Result]] | None = None  # steps that were sent but have not run
        self._decoder: Decoder = ScheduledDecoder(manifest.schedule)
        if manifest.decoder == "jacobi":
            self._decoder = JacobiDecoder()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the engine's memory back; the session is dead then."""
        self._run += 1
        self.engine.close()

    @property
    def stream(self) -> Stream:
        """The stream that is decoded; another one may be put in its place, as a branch or a restored one."""
        return self._stream

    @stream.setter
    def stream(self, stream: Stream) -> None:
        if (stream.layout, stream.window) != (self.layout, self.window):
            raise UsageError(
                f"the stream has a window of {stream.window} frames and {stream.layout}; this session's has "
                f"{self.window} and {self.layout}"
            )
        self._run += 1
        self._stream = stream

    def start(self, frames: Ids, actions: Ids | None = None, text: Float | None = None) -> None:
        """Forget everything and take a prompt.

        Args:
            frames: int32 [P, rows, columns], P at least 1 and below the window.
            actions: int32 [P, n], ids of the known tokens leading to each prompt frame; row 0 only matters
                where known tokens precede the first frame. Not needed for models without actions.
            text: float32 [n, width], embeddings of the text, for models that attend to one.

        Raises:
            UsageError: shape or length does not fit the model, or it needs a text.
        """
        self._check_text(text)
        self._run += 1
        self._stream.start(frames, actions)
        self._stream.text = text

    def generate(
        self,
        frames: int,
        actions: Ids | None = None,
        *,
        schedule: Schedule | None = None,
        sampling: SamplingSettings | None = None,
        seed: int = 0,
    ) -> Iterator[Frame]:
        """Frames by a schedule, or the manifest's decoder, under actions [frames, n]; see ``frames``."""
        if self.layout.gap and (actions is None or len(actions) != frames):
            raise UsageError(
                f"{frames} frames need actions of shape [{frames}, {self.layout.gap}], "
                f"got {'none' if actions is None else list(np.shape(actions))}"
            )
        decoder = None if schedule is None else ScheduledDecoder(schedule)
        return self.frames(decoder, actions, count=frames, sampling=sampling, seed=seed)

    def frames(
        self,
        decoder: Decoder | None = None,
        actions: Actions = None,
        *,
        count: int | None = None,
        sampling: SamplingSettings | None = None,
        seed: int = 0,
    ) -> Iterator[Frame]:
        """Decode frames behind what is known, yielding each when it is complete.

        Args:
            decoder: strategy; default: the manifest's.
            actions: of each frame, pulled when it begins; see ``diagd.runtime.stream.Actions``.
            count: most frames; without it the run ends with the actions, or never.
            sampling: default: the manifest's.
            seed: of the random numbers; with the same engine, the same seed gives the same tokens.

        Raises:
            UsageError: there is no prompt, actions are missing, or the decoder does not fit. On resuming a
                run after another one was started: it was overtaken.
        """
        decoder, run = self._start_run(decoder, actions, count, sampling, seed)
        return self._frames(decoder, run)

    def steps(
        self,
        decoder: Decoder | None = None,
        actions: Actions = None,
        *,
        count: int | None = None,
        sampling: SamplingSettings | None = None,
        seed: int = 0,
    ) -> Iterator[tuple[Step, Result]]:
        """The same run step by step: each with what it gave, which is valid until the next one."""
        by_frame = self.frame_steps(decoder, actions, count=count, sampling=sampling, seed=seed)
        return chain.from_iterable(by_frame)

    def frame_steps(
        self,
        decoder: Decoder | None = None,
        actions: Actions = None,
        *,
        count: int | None = None,
        sampling: SamplingSettings | None = None,
        seed: int = 0,
    ) -> Iterator[Iterator[tuple[Step, Result]]]:
        """Likewise, the steps up to each completion of a frame by themselves: known when they are run out."""
        decoder, run = self._start_run(decoder, actions, count, sampling, seed)
        return self._frame_steps(decoder, run)

    def step(
        self,
        action: Ids | None = None,
        decoder: Decoder | None = None,
        *,
        sampling: SamplingSettings | None = None,
        seed: int | None = None,
    ) -> Frame:
        """Decode one frame under one action int32 [n]; ``seed`` None is that of the run before."""
        actions = None if action is None else [np.asarray(action)]
        seed = self._stream.seed if seed is None else seed
        return next(iter(self.frames(decoder, actions, count=1, sampling=sampling, seed=seed)))

    def act(self, *, sampling: SamplingSettings | None = None, seed: int | None = None) -> Int:
        """The action int32 [n] that the model takes at the last frame; the stream stays as it is.

        It is the one that leads to the next frame where the model's actions are not replaced.

        Raises:
            UsageError: there is no prompt, or the model decodes no actions.
        """
        seed = self._stream.seed if seed is None else seed
        _, run = self._start_run(ActingDecoder(), [None], 1, sampling, seed)
        for _ in self._decode(ActingDecoder(), run):
            pass
        assert self._stream.action is not None
        return self._stream.action

    def _start_run(
        self,
        decoder: Decoder | None,
        actions: Actions,
        count: int | None,
        sampling: SamplingSettings | None,
        seed: int,
    ) -> tuple[Decoder, int]:
        stream = self._stream
        if not stream.known:
            raise UsageError("a session needs a prompt; call start(frames, actions) first")
        if self.layout.gap and actions is None:
            raise UsageError(f"frames need actions of {self.layout.gap} ids each, got none")
        check_seed(seed)
        decoder = decoder or self._decoder
        stream.padded, stream.seed, stream.law = self._padded(), seed, self._law
        stream.settings = self._settings(sampling)
        self._run += 1
        self._bring_cache()
        stream.horizon = self._context.horizon
        stream.follow(actions, count)
        decoder.check(stream)
        return decoder, self._run

    def _padded(self) -> Int:
        return self.engine.padded_widths(np.arange(self.engine.max_width + 1, dtype=np.int32))

    def _settings(self, chosen: SamplingSettings | None) -> SamplingSettings:
        rules = self.manifest.sampling
        settings = chosen or SamplingSettings(rules.temperature, rules.top_k, rules.top_p)
        if 0 < settings.temperature < rules.minimum_temperature:
            return replace(settings, temperature=rules.minimum_temperature)
        return settings

    def _frame_steps(self, decoder: Decoder, run: int) -> Iterator[Iterator[tuple[Step, Result]]]:
        known = -1
        while known < self._stream.known:
            known = self._stream.known
            steps = self._decode(decoder, run, watched=True)
            yield ((block.step(number), result) for block, number, result in steps)

    def _frames(self, decoder: Decoder, run: int) -> Iterator[Frame]:
        stream, timing = self._stream, self.timing
        while True:
            known, began = stream.known, time.perf_counter()
            refilled = timing.refill_steps, timing.refill_seconds
            steps = sum(1 for _ in self._decode(decoder, run))
            if known == stream.known:
                return
            for frame in range(known, stream.known):
                passes, spent = timing.refill_steps - refilled[0], timing.refill_seconds - refilled[1]
                seconds, tokens = time.perf_counter() - began, stream.frame(frame)
                action = stream.past[frame - stream.known].actions
                yield Frame(frame, tokens, steps, seconds, stream.exact, action, passes, spent)
                began, steps, refilled = time.perf_counter(), 0, (timing.refill_steps, timing.refill_seconds)

    def _decode(
        self, decoder: Decoder, run: int, timing: Timing | None = None, *, watched: bool = False
    ) -> Iterator[tuple[Block, int, Result]]:
        """Run a decoder until one more frame, or a few, are complete; steps count to ``timing``.

        Where they are not ``watched``, what the steps between the last of a block gave may be gone.
        """
        stream, known = self._stream, self._stream.known
        self._check_run(run)
        blocks = decoder.blocks(stream)
        for step in self._left or ():
            yield step
            self._check_run(run)
        block = next(blocks, None)
        while block is not None:
            result: Result | None = None
            self._left = self._run_block(block, timing or self.timing, watched)
            for _, number, result in islice(self._left, block.pause or None):
                yield block, number, result
                self._check_run(run)
            assert result is not None
            self._left = self._left if block.pause else None
            try:
                block = blocks.send(result)
            except StopIteration:
                block = None
        self._send_tokens()
        for frame in range(known, stream.known):
            cells = stream.places.cells(frame)
            places = np.arange(cells.start, cells.stop, dtype=np.int32)
            stream.settle(frame, self.engine.read_tokens(places))

    def _check_run(self, run: int) -> None:
        if run != self._run:
            raise UsageError(
                "this run was overtaken: the session was started, moved or closed since, or decodes for "
                "another run; go on with the latest one, or open a second session"
            )

    def _run_block(self, block: Block, timing: Timing, watched: bool) -> Iterator[tuple[Block, int, Result]]:
        """Run the steps of a block, which are worked out together."""
        began = time.perf_counter()
        stream, engine = self._stream, self.engine
        if stream.rejected is not None:
            self._slots.rewind(stream.rejected)
            stream.rejected = None
        while self._prepared < stream.begun + (stream.acting and self._context.slides_first):
            refill = self._context.advance(self._prepared, int(block.positions.min()))
            self._prepared += 1
            if refill is not None:
                self._refill(refill)
                began = time.perf_counter()
        steps = self._pack(block)
        parts = sorted({block.pause, len(steps)} - {0})
        engine.send(steps, None if watched or self.stamps is not None else parts)
        widths, live = block.shape.widths.tolist(), steps.live.tolist()
        bounds = steps.decode_offsets.tolist()
        for n, width in enumerate(widths):
            if stream.unsent:  # written by whoever watched the step before
                self._send_tokens()
            entered = time.perf_counter()
            self._step()
            left = time.perf_counter()
            engine.draw()
            sampled = time.perf_counter()
            first, last = bounds[n], bounds[n + 1]
            size = width, last - first, live[n]
            spent = StepTime(began, *size, left - entered, sampled - left, entered - began)
            timing.add(spent)
            yield block, n, Result(engine, steps.sinks[first:last], spent)
            began = time.perf_counter()

    def _step(self) -> None:
        """One pass of the engine, between time stamps where they are wanted."""
        if (number := self.stamps) is None:
            self.engine.step()
            return
        self.engine.clock.mark(number)
        self.engine.step()
        self.engine.clock.mark(number + 1)
        self.stamps = number + 2

    def _pack(self, block: Block) -> Steps:
        """The steps of a block as the engine takes them."""
        stream, engine, slots = self._stream, self.engine, self._slots
        if block.drafts is not None:
            drafted = np.flatnonzero(block.drafts >= 0)
            stream.write(block.sources[drafted], block.drafts[drafted])
        self._send_tokens()
        if slots.stale:
            engine.write_slots(slots.slot_position)
            slots.whole_sent()
        shape = block.shape
        positions = np.subtract(block.positions, slots.base, dtype=np.int32, casting="unsafe")
        taken = slots.append(positions, shape, engine.padded_widths(shape.widths))
        cells = block.sinks[shape.decoding]
        places = stream.places.of(np.concatenate([block.sources, cells]))
        sources, sinks = places[: len(positions)], places[len(positions) :]
        return Steps(
            *(shape.offsets, sources, positions, shape.draws, shape.decoded),
            sinks if block.commit else stream.places.scratch + shape.decoded,
            cells.astype(np.int64, copy=False),
            *taken,
            stream.sampling,
        )

    def _send_tokens(self) -> None:
        """Give the engine the tokens that were written since the last step."""
        for places, ids in self._stream.unsent:
            self.engine.write_tokens(places, ids)
        self._stream.unsent.clear()

    def _refill(self, refill: Refill) -> None:
        """Feed known tokens again, in passes as wide as the engine takes."""
        began, timing = time.perf_counter(), Timing()
        self._stream.refills += 1
        block = replace(feed(refill.positions, self.engine.max_width), sources=refill.sources)
        for _ in self._run_block(block, timing, watched=False):
            pass
        self.timing.refill_steps += timing.steps
        self.timing.refill_seconds += time.perf_counter() - began

    def _bring_cache(self) -> None:
        """Make the engine's rows those of the stream, up to what it says is fed."""
        stream = self._stream
        self._prepared = stream.known
        if self._left is not None:  # what they were to hide is not hidden
            self._left, self._slots.stale = None, True
        if self._cached != (stream, stream.beginnings):
            self._cached = stream, stream.beginnings
            self._read_text()
            self._rebuild()
        elif not self._context.holds(stream.known):
            self._rebuild()
        else:
            self._slots.rewind(stream.fed)

    def _rebuild(self) -> None:
        """Decode again what is known, its tokens given, as far back as rows in the window depend on it."""
        stream, past = self._stream, list(self._stream.past)
        known, kept = stream.known, stream.known - len(past)
        plan = self._context.replay(known, kept, stream.prompt)
        if known == stream.prompt:
            stream.fed, self._prepared = 0, known
            return
        began, timing = time.perf_counter(), Timing()
        prefix = np.arange(self.layout.prefix)
        if plan.first and len(prefix):
            self._refill(Refill(prefix, prefix + self._slots.base))
        self._context.resume(plan.first)
        stream.return_to(plan.behind, past[: plan.behind - kept])
        stream.fed = self.layout.frame_start(plan.first) if plan.first else 0
        self._prepared = plan.behind
        for (order, _), frames in groupby(past[plan.behind - kept :], lambda one: (one.order, one.origin)):
            self._replay(order, list(frames), timing)
        self.timing.refill_steps += timing.steps
        self.timing.refill_seconds += time.perf_counter() - began

    def _replay(self, order: Schedule | None, frames: list[Past], timing: Timing) -> None:
        truth, stream = [past.tokens for past in frames], self._stream
        decoder: Decoder = RasterDecoder(truth) if order is None else ForcedDecoder(order, truth)
        stream.follow([past.actions for past in frames], len(frames))
        for _ in frames:
            for _ in self._decode(decoder, self._run, timing):
                pass

    def _check_text(self, text: Float | None) -> None:
        if self._text is None and text is not None:
            raise UsageError(f"{self.manifest.name} attends to no text; leave it out")
        if self._text is not None and text is None:
            spec = self._text.spec
            raise UsageError(
                f"{self.manifest.name} needs text embeddings [n, {spec.width}], n up to {spec.length}"
            )
        if self._text is not None and text is not None:
            self._text.check(text)

    def _read_text(self) -> None:
        if self._text is not None and self._stream.text is not None:
            self.engine.set_text(self._text.rows(self._stream.text))
