"""Decoding with the tokens known: the steps run, and their predictions are looked at but not kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diagd.runtime.decoders.decoder import Blocks, Decoder
from diagd.runtime.decoders.scheduled import ScheduledDecoder
from diagd.runtime.stream import Stream
from diagd.schedule import Schedule, feed

Frames = Iterable[NDArray[np.integer[Any]]]


class ForcedDecoder(Decoder):
    """Teacher forcing: a schedule's steps over given tokens.

    Args:
        schedule: decoding order.
        truth: tokens [rows, columns] of each frame, written when it begins. None: the caller writes them with
            ``stream.write`` before a step reads them, as it does to follow another session step by step.
    """

    def __init__(self, schedule: Schedule, truth: Frames | None = None) -> None:
        self._scheduled = ScheduledDecoder(schedule)
        self._truth: Iterator[NDArray[np.integer[Any]]] | None = None if truth is None else iter(truth)

    @override
    def check(self, stream: Stream) -> None:
        self._scheduled.check(stream)

    @override
    def blocks(self, stream: Stream) -> Blocks:
        blocks, written = self._scheduled.blocks(stream), stream.begun
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
                stream.write(stream.layout.first_cell(frame), np.reshape(next(self._truth), -1))
        return stream.begun


class RasterDecoder(Decoder):
    """Feeds given frames in raster order, in as few passes as they take; predicts nothing.

    Args:
        truth: tokens [rows, columns] of each frame.
    """

    def __init__(self, truth: Frames) -> None:
        self._truth = iter(truth)

    @override
    def check(self, stream: Stream) -> None:
        """Anything goes."""

    @override
    def blocks(self, stream: Stream) -> Blocks:
        if not stream.begin():
            return
        start = stream.layout.first_cell(stream.begun - 1)
        stream.write(start, np.reshape(next(self._truth), -1))
        yield feed(np.arange(stream.fed, start + stream.layout.cells - 1), stream.max_width)
        stream.complete(None)
