"""A session: a stream of frames, decoded step by step over one engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from typing import Any, TypeAlias, TypeVar

import numpy as np
from typing_extensions import Never, Unpack

from diagd.bundle import Manifest
from diagd.engines.engine import Engine, Float, Int, Steps
from diagd.engines.sampler import check_seed
from diagd.errors import UsageError, expect
from diagd.runtime.arrays import rows_in
from diagd.runtime.context import Refill, context_policy
from diagd.runtime.decoders.decoder import ActingDecoder, Decoder
from diagd.runtime.decoders.jacobi import JacobiDecoder
from diagd.runtime.decoders.scheduled import ForcedDecoder, RasterDecoder, ScheduledDecoder
from diagd.runtime.sampling import ActionLaw, SamplingSettings
from diagd.runtime.slots import SlotRing
from diagd.runtime.step import Due, Frame, Passes, Result, Run, Timing
from diagd.runtime.stream import Actions, Ids, Past, RunOptions, Stream
from diagd.runtime.text import TextReader, check_text
from diagd.schedule import Block, Schedule, Step, StreamLayout, feed, slots_in_sight

T = TypeVar("T")
Seen: TypeAlias = tuple[Step, Result]
"""A step, with what it gave."""


class Session:
    """Decodes a stream over one engine, whose K/V rows it keeps in step with it.

    Args:
        manifest: of the bundle.
        engine: compiled step graph over KV buffers large enough for ``window``; closed with the session.
        window: frames that a query may see, its own included; older ones are evicted.
        zero_slots: positions that start as visible zero rows (the released MineWorld code's cache).
        roll: frames by which a full window slides at once and is fed again; default: the manifest's.
        text: reads text, for models that attend to it.
        passes, lane: of the engine, where other sessions share it; whoever made it closes it then.

    Attributes:
        timing: of all passes so far.
        decoder: of runs that name none.

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
        passes: Passes | None = None,
        lane: int = 0,
    ) -> None:
        self.passes, self._owns = passes or Passes(engine), passes is None  # first: it says why copies fail
        self.manifest, self.engine, self.window, self.lane = manifest, engine, window, lane
        self.layout: StreamLayout = manifest.layout
        self.timing = Timing()
        zero_rows = (self.layout.frame_start(0), self.layout.frame_start(window)) if zero_slots else (0, 0)
        self._slots = SlotRing(engine.capacity, zero_rows, slots_in_sight(self.layout, window))
        self._context = context_policy(
            manifest, window, self._slots, lambda angles, live: engine.rotate_keys(angles, live, lane), roll
        )
        needed, padded = self._context.needed, self._padded()
        history = needed + window + 1
        self._stream = Stream(self.layout, window, padded, history, needed, manifest.vocabulary)
        self._rows = object()  # of the stream whose rows the engine holds
        self._prepared, self._text, self._law = 0, text, ActionLaw.of(manifest)
        self._left: Run[Seen | None] | None = None  # steps that were sent but have not run
        self._result: Result
        jacobi = manifest.decoder == "jacobi"
        self.decoder: Decoder = JacobiDecoder() if jacobi else ScheduledDecoder(manifest.schedule)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the engine's memory back, or the place in it; the session is dead then."""
        self._stream.run = object()
        with self.passes.held:
            if self._owns:
                self.passes.close()
            elif not self.closed:
                self._slots.restart(0)
                self.engine.write_slots(self._slots.slot_position, self.lane)
                self._rows = object()

    @property
    def closed(self) -> bool:
        """Whether its engine is."""
        return self.passes.closed

    @property
    def stream(self) -> Stream:
        """The stream that is decoded; another one may be put in its place, as a branch or a restored one."""
        return self._stream

    @stream.setter
    def stream(self, stream: Stream) -> None:
        self._stream.check_alike(stream)
        stream.run = object()
        self._stream = stream

    def start(self, frames: Ids, actions: Ids | None = None, text: Float | None = None) -> None:
        """Take a prompt and forget all else; rows that are there of it are not built again.

        See ``Stream.start``; ``text`` is float32 [n, width], embeddings for models that attend to a text.

        Raises:
            UsageError: shape or length does not fit the model, or it needs a text; the session is closed.
        """
        self.passes.check_open()
        check_text(self.manifest, text)
        self._stream.start(frames, actions, text)

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
        if self.layout.gap and (actions is None or rows_in(actions) != frames):
            raise UsageError(
                f"{frames} frames need actions of shape [{frames}, {self.layout.gap}], "
                f"got {'none' if actions is None else f'{rows_in(actions)} rows'}"
            )
        decoder = None if schedule is None else ScheduledDecoder(schedule)
        return self.frames(decoder, actions, count=frames, sampling=sampling, seed=seed)

    def frames(
        self, decoder: Decoder | None = None, actions: Actions = None, **options: Unpack[RunOptions]
    ) -> Iterator[Frame]:
        """Decode frames behind what is known, yielding each when it is complete.

        See ``Actions`` and ``RunOptions`` of ``diagd.runtime.stream``; default: the manifest's decoder.

        Raises:
            UsageError: there is no prompt, actions are missing, or the decoder does not fit. On resuming a
                run after another one was started, or its stream was moved: it was overtaken.
        """
        return self.alone(self.run(decoder, actions, **options))

    def run(
        self, decoder: Decoder | None = None, actions: Actions = None, **options: Unpack[RunOptions]
    ) -> Run[Frame]:
        """The same run for whoever has its passes run, as a group of sessions does."""
        return self._frames(*self._start_run(decoder, actions, **options))

    def steps(
        self, decoder: Decoder | None = None, actions: Actions = None, **options: Unpack[RunOptions]
    ) -> Iterator[Seen]:
        """The same run step by step: each with what it gave, which is valid until the next one."""
        return self.alone(self.watch(decoder, actions, **options))

    def watch(
        self, decoder: Decoder | None = None, actions: Actions = None, **options: Unpack[RunOptions]
    ) -> Run[Seen]:
        """Likewise for whoever has its passes run; what a step gave is valid until the next pass."""
        return chain.from_iterable(self._by_frame(*self._start_run(decoder, actions, **options)))

    def frame_steps(
        self, decoder: Decoder | None = None, actions: Actions = None, **options: Unpack[RunOptions]
    ) -> Iterator[Iterator[Seen]]:
        """Likewise, the steps up to each completion of a frame by themselves: known when they are run out."""
        return map(self.alone, self._by_frame(*self._start_run(decoder, actions, **options)))

    def step(
        self,
        action: Ids | None = None,
        decoder: Decoder | None = None,
        *,
        sampling: SamplingSettings | None = None,
        seed: int | None = None,
    ) -> Frame:
        """Decode one frame under one action int32 [n]; ``seed`` None is that of the run before.

        Threads that call it take turns.
        """
        actions = None if action is None else [action]
        with self.passes.turn:
            seed = self._stream.seed if seed is None else seed
            return next(iter(self.frames(decoder, actions, count=1, sampling=sampling, seed=seed)))

    @property
    def acts(self) -> bool:
        """Whether the model decodes actions."""
        return self._law is not None

    def act(self, *, sampling: SamplingSettings | None = None, seed: int | None = None) -> Int:
        """The action int32 [n] that the model takes at the last frame; the stream stays as it is.

        It is the one that leads to the next frame where the model's actions are not replaced; UsageError
        without a prompt, or where the model decodes no actions.
        """
        with self.passes.turn:
            seed = self._stream.seed if seed is None else seed
            decoder, run = self._start_run(ActingDecoder(), [None], count=1, sampling=sampling, seed=seed)
            self._finish(self._decode(decoder, run, self.timing))
            assert self._stream.action is not None
            return self._stream.action

    def alone(self, run: Run[T]) -> Iterator[T]:
        """What a run of this session comes to, its passes for this session alone; threads take turns."""
        passes, lanes = self.passes, (self.lane,)
        while True:
            with passes.turn:
                while isinstance(event := next(run, None), Due):
                    for _ in event.draws:
                        event.times.append(passes.run(lanes))
            if event is None:
                return
            yield event

    def _start_run(
        self,
        decoder: Decoder | None,
        actions: Actions,
        *,
        count: int | None = None,
        sampling: SamplingSettings | None = None,
        seed: int = 0,
        newer: Callable[[int], Ids | None] | None = None,
    ) -> tuple[Decoder, object]:
        stream = self._stream
        self.passes.check_open()
        if not stream.known:
            raise UsageError("a session needs a prompt; call start(frames, actions) first")
        if self.layout.gap and actions is None:
            raise UsageError(f"frames need actions of {self.layout.gap} ids each, got none")
        expect(RunOptions, {"newer": newer})
        check_seed(seed)
        decoder = self.decoder if decoder is None else decoder
        if isinstance(decoder, type) or not (hasattr(decoder, "blocks") and hasattr(decoder, "check")):
            raise UsageError(
                f"the decoder is {decoder!r}; expected one such as "
                "diagd.ScheduledDecoder(diagd.Schedule.chained(session.layout, k=1))"
            )
        with self.passes.turn, self.passes:
            stream.padded, stream.seed, stream.law = self._padded(), seed, self._law
            stream.settings = SamplingSettings.of(self.manifest.sampling, sampling)
            self._bring_cache()
            stream.horizon = self._context.horizon
            stream.follow(actions, count)
            stream.newer = newer
            decoder.check(stream)
            return decoder, stream.run

    def _padded(self) -> Int:
        return self.engine.padded_widths(np.arange(self.engine.max_width + 1, dtype=np.int32))

    def _by_frame(self, decoder: Decoder, run: object) -> Iterator[Run[Seen]]:
        known = -1
        while known < self._stream.known:
            known = self._stream.known
            yield self._decode(decoder, run, self.timing, watched=True)

    def _frames(self, decoder: Decoder, run: object) -> Run[Frame]:
        stream, timing = self._stream, self.timing
        while True:
            known, began, before = stream.known, time.perf_counter(), replace(timing)
            yield from self._decode(decoder, run, timing)  # type: ignore[misc]  # nothing is watched
            if known == stream.known:
                return
            spent = timing.since(before)
            for frame in range(known, stream.known):
                seconds, tokens = time.perf_counter() - began, stream.frame(frame)
                action, refills = stream.past[frame - stream.known].actions, spent.refill_steps
                again = spent.refill_seconds
                yield Frame(frame, tokens, spent.steps, seconds, stream.exact, action, refills, again)
                began, spent = time.perf_counter(), Timing()

    def _decode(self, decoder: Decoder, run: object, timing: Timing, *, watched: bool = False) -> Run[Seen]:
        """Run a decoder until one more frame, or a few, are complete; steps count to ``timing``.

        Steps are given out where they are ``watched``; else what those between the last of a block gave may
        be gone.
        """
        stream, known = self._stream, self._stream.known
        self._check_run(run)
        blocks = decoder.blocks(stream)
        for event in self._left or ():
            if event is not None:
                yield event
        block = next(blocks, None)
        while block is not None:
            self._left = self._run_block(block, run, timing, watched)
            for event in self._left:
                if event is None:
                    break
                yield event
            else:
                self._left = None
            try:
                block = blocks.send(self._result)
            except StopIteration:
                block = None
        self._send_tokens()
        for frame in range(known, stream.known):
            cells = stream.places.cells(frame)
            places = np.arange(cells.start, cells.stop, dtype=np.int32)
            with self.passes:
                stream.settle(frame, self.engine.read_tokens(places, self.lane))

    def _check_run(self, run: object) -> None:
        if run is not self._stream.run:
            raise UsageError(
                "this run was overtaken: the session was started, moved or closed since, or decodes for "
                "another run; go on with the latest one, or open a second session"
            )

    def _run_block(self, block: Block, run: object, timing: Timing, watched: bool) -> Run[Seen | None]:
        """The steps of a block, which are worked out together; None where it pauses."""
        began = time.perf_counter()
        stream, engine, passes = self._stream, self.engine, self.passes
        if stream.rejected is not None:
            self._slots.rewind(stream.rejected)
            stream.rejected = None
        while self._prepared < stream.begun + (stream.acting and self._context.slides_first):
            with passes:
                refill = self._context.advance(self._prepared, int(block.positions.min()))
            self._prepared += 1
            if refill is not None:
                yield from self._refill(refill)
                began = time.perf_counter()
        with passes:
            steps, each = self._pack(block), watched or passes.stamps is not None
            ends = sorted({block.pause, len(steps)} - {0})
            engine.send(steps, None if each else ends, self.lane)
        first, bounds, draws = 0, steps.decode_offsets, np.diff(steps.decode_offsets).tolist()
        sizes = list(zip(block.shape.widths.tolist(), draws, steps.live.tolist(), strict=True))
        for end in range(1, len(steps) + 1) if watched else ends:
            if stream.unsent:  # written by whoever watched the step before
                self._send_tokens()
            yield (due := Due(draws[first:end], partial(self._check_run, run)))
            self._check_run(run)
            spent = timing.add(began, sizes[first:end], due.times)
            self._result = Result(engine, steps.sinks[bounds[end - 1] : bounds[end]], spent, self.lane)
            if watched:
                yield block.step(end - 1), self._result
                self._check_run(run)
            if end == block.pause:
                yield None
                self._check_run(run)
            began, first = time.perf_counter(), end

    def _pack(self, block: Block) -> Steps:
        """The steps of a block as the engine takes them."""
        stream, engine, slots = self._stream, self.engine, self._slots
        self._send_tokens()
        if slots.stale:
            engine.write_slots(slots.slot_position, self.lane)
            slots.whole_sent()
        shape = block.shape
        positions = np.subtract(block.positions, np.int64(slots.base), dtype=np.int32, casting="unsafe")
        taken = slots.append(positions, shape, engine.written_widths(shape.widths))
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
        with self.passes:
            for places, ids in self._stream.unsent:
                self.engine.write_tokens(places, ids, self.lane)
        self._stream.unsent.clear()

    def _refill(self, refill: Refill) -> Run[Never]:
        """Feed known tokens again, in passes as wide as the engine takes."""
        if not len(refill.positions):
            return
        began, timing = time.perf_counter(), Timing()
        self._stream.refills += 1
        block = replace(feed(refill.positions, self.engine.max_width), sources=refill.sources)
        yield from self._run_block(block, self._stream.run, timing, False)  # type: ignore[misc]
        self.timing.add_refill(timing.steps, time.perf_counter() - began)

    def _bring_cache(self) -> None:
        """Make the engine's rows those of the stream, up to what it says is fed."""
        stream = self._stream
        self._prepared = stream.known
        if self._left is not None:  # what they were to hide is not hidden
            self._left, self._slots.stale = None, True
        if stream.rows is not self._rows:
            check_text(self.manifest, stream.text)
            if self._text is not None and stream.text is not None:
                self.engine.set_text(self._text.rows(stream.text))
            stream.unsent = [(np.arange(len(stream.tokens), dtype=np.int32), stream.tokens.copy())]
        elif self._context.holds(stream.known, stream.past[-1].overlapped):
            self._slots.rewind(stream.fed)
            return
        self._rows, stream.rows = object(), None  # until all are there
        self._rebuild()
        stream.rows = self._rows

    def _rebuild(self) -> None:
        """Decode again what is known, its tokens given, as far back as rows in the window depend on it."""
        stream, past = self._stream, list(self._stream.past)
        known, kept = stream.known, stream.known - len(past)
        plan = self._context.replay(known, kept, stream.prompt)
        began, timing, prefix = time.perf_counter(), Timing(), np.arange(self.layout.prefix)
        try:
            stream.return_to(plan.behind, past[: plan.behind - kept])
            stream.fed = self.layout.frame_start(plan.first) if plan.first else 0
            self._prepared = plan.behind
            if plan.first:
                self._finish(self._refill(Refill(prefix, prefix + self._slots.base)))
            self._context.resume(plan.first)
            for (order, _), frames in groupby(past[plan.behind - kept :], lambda of: (of.order, of.origin)):
                self._replay(order, list(frames), timing)
        finally:  # also where a pass was interrupted; with their flights, whose beginnings may be gone
            stream.return_to(known, past)
        self.timing.add_refill(timing.steps, time.perf_counter() - began)

    def _replay(self, order: Schedule | None, frames: list[Past], timing: Timing) -> None:
        truth, stream = [past.tokens for past in frames], self._stream
        decoder: Decoder = RasterDecoder(truth) if order is None else ForcedDecoder(order, truth)
        stream.follow([past.actions for past in frames], len(frames))
        for _ in frames:
            self._finish(self._decode(decoder, stream.run, timing))

    def _finish(self, run: Run[Any]) -> None:
        """Have all that a run waits for, for this session alone."""
        for _ in self.alone(run):
            pass
