"""Decoding by a schedule: next-token prediction, diagonal, serial or chained frames."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from diagd.errors import UsageError
from diagd.runtime.decoders.acting import begun
from diagd.runtime.decoders.decoder import Blocks, Decoder
from diagd.runtime.stream import Stream
from diagd.schedule import Schedule


@dataclass(frozen=True)
class ScheduledDecoder(Decoder):
    """Runs the steps of a schedule; every prediction is kept."""

    schedule: Schedule

    @override
    def check(self, stream: Stream) -> None:
        """Frames in flight fit the window, steps fit the engine."""
        schedule, in_flight = self.schedule, self.schedule.frames_in_flight
        if stream.window < in_flight:
            raise UsageError(
                f"k={schedule.k}, d={schedule.d} has {in_flight} frames under way at once, the window holds "
                f"{stream.window}; use a larger window or a larger d"
            )
        widest = schedule.widest_step
        if widest > stream.max_width:
            raise UsageError(
                f"a step of k={schedule.k}, d={schedule.d} feeds {widest} tokens, graphs of this bundle take "
                f"up to {stream.max_width}; use a larger k or d, or export with --set widths={widest}"
            )
        last = None if stream.limit is None else stream.limit - 1
        if stream.horizon is None or schedule.d == schedule.steps_per_frame:
            return
        if last is None or last > stream.horizon:
            raise UsageError(
                f"frame {stream.horizon + 1 if last is None else last} slides the window of {stream.window} "
                f"frames, which this model does only between frames; d={schedule.d} overlaps them: use "
                "serial frames, or fewer frames"
            )

    @override
    def blocks(self, stream: Stream) -> Blocks:
        """A block goes on to where the next frame begins, past the completion of the oldest in flight."""
        schedule = self.schedule
        rows = 1 if schedule.is_next_token else None
        if stream.begun == stream.known and not (yield from begun(stream, rows)):
            return
        done = stream.known - stream.origin
        last = done * schedule.d + schedule.steps_per_frame
        begins = (stream.begun - stream.origin) * schedule.d  # step at which the next frame would begin
        first = max(begins, last - schedule.d) if done else -1
        unfed = stream.layout.first_cell(stream.origin) - stream.fed if not done else 1
        while first < last:
            if begins == first and stream.begin():
                begins += schedule.d
            end = begins if begins > first else last  # else the run has no further frame
            frames = stream.begun - stream.origin
            yield schedule.block(stream.origin, frames, (first, end), last, unfed, stream.max_width)
            first = end
        stream.complete(schedule, exact=schedule.is_next_token)
