"""Decoding by a schedule: next-token prediction, diagonal, serial or chained frames; or of known tokens.

The steps of known tokens run, and their predictions are looked at but not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diagd.errors import UsageError, expect
from diagd.runtime.decoders.decoder import Blocks, Decoder, begun
from diagd.runtime.snapshot import shape
from diagd.runtime.stream import Stream
from diagd.schedule import Block, Schedule, feed, predicting


@dataclass(frozen=True)
class ScheduledDecoder(Decoder):
    """Runs the steps of a schedule; every prediction is kept."""

    schedule: Schedule

    def __post_init__(self) -> None:
        expect(ScheduledDecoder, vars(self))

    @override
    def check(self, stream: Stream) -> None:
        """The stream is the schedule's, frames in flight fit the window, steps fit the engine."""
        schedule, in_flight = self.schedule, self.schedule.frames_in_flight
        if shape(schedule.layout) != shape(stream.layout):
            raise UsageError(
                f"the schedule is of {schedule.layout}, the stream of {stream.layout}; make one of "
                "session.layout"
            )
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
        if stream.horizon is None or not schedule.overlaps:
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


Frames = Iterable[NDArray[np.integer[Any]]]


class ForcedDecoder(ScheduledDecoder):
    """Teacher forcing: a schedule's steps over given tokens.

    Args:
        schedule: decoding order.
        truth: tokens [rows, columns] of each frame, written when it begins. None: the caller writes them with
            ``stream.write`` before a step reads them, as it does to follow another session step by step.
    """

    def __init__(self, schedule: Schedule, truth: Frames | None = None) -> None:
        expect(ForcedDecoder.__init__, locals())
        super().__init__(schedule)
        self._truth: Iterator[NDArray[np.integer[Any]]] | None = None if truth is None else iter(truth)

    @override
    def blocks(self, stream: Stream) -> Blocks:
        blocks, written = super().blocks(stream), stream.begun
        block = next(blocks, None)
        while block is not None:
            written = self._write(stream, written)
            result = yield replace(block, commit=False)
            try:
                block = blocks.send(result)
            except StopIteration:
                return

    def _write(self, stream: Stream, written: int) -> int:
        """Give the frames that have begun since their tokens."""
        if self._truth is not None:
            for frame in range(written, stream.begun):
                stream.give(frame, next(self._truth, None))
        return stream.begun


def raster_passes(fed: int, start: int, cells: int, rows: int) -> Iterator[Block]:
    """Passes over known tokens up to a frame's last cell; rows from the one ahead of its first on predict.

    From position ``fed`` on, the frame's first cell standing at ``start``, in passes of at most ``rows``.
    """
    last = start + cells - 1
    for first in range(fed, last, rows):
        yield predicting(first, min(first + rows, last), start - 1, commit=False)


class RasterDecoder(Decoder):
    """Feeds given frames in raster order.

    Args:
        truth: tokens [rows, columns] of each frame.
        rows: of the widest pass, each of which predicts the cell behind it, to be looked at. None: as many as
            the engine takes, and nothing is predicted.
    """

    def __init__(self, truth: Frames, rows: int | None = None) -> None:
        self._truth, self._rows = iter(truth), rows

    @override
    def blocks(self, stream: Stream) -> Blocks:
        if not (yield from begun(stream)):
            return
        start = stream.layout.first_cell(stream.begun - 1)
        stream.give(stream.begun - 1, next(self._truth, None))
        if self._rows is None:
            yield feed(np.arange(stream.fed, start + stream.layout.cells - 1), stream.max_width)
        else:
            rows = min(self._rows, stream.max_width)
            yield from raster_passes(stream.fed, start, stream.layout.cells, rows)
        stream.complete(None, exact=False)
