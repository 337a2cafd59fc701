"""Decoding with positions inside a window: when it is full, everything that stays is computed afresh."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diagd.schedule import Schedule
from tests.oracles.full_recompute import Fed, FullRecompute
from tests.oracles.rows import Row, rows_of


class SlidingOracle:
    """Decodes frame by frame; when the window is full it starts afresh on the frames that stay."""

    def __init__(
        self, decoder: Callable[[], FullRecompute], window: int, roll: int, sampled: range, first: int = 0
    ) -> None:
        """``sampled`` are ids that may be decoded, from ``first`` on for the first cell of a frame."""
        self.fresh, self.window, self.roll, self.sampled, self.first = decoder, window, roll, sampled, first
        self.decoder = decoder()
        self.layout = self.decoder.layout
        self.base_frame, self.slides = 0, 0

    def run(self, schedule: Schedule, prompt: int, frames: int, stream: np.ndarray) -> None:
        """Decode into ``stream`` with frames strictly one after another."""
        table, length = schedule.table(prompt, frames, 0), self.layout.frame_length
        steps, first = rows_of(table), 0
        for frame, end in enumerate(table.frame_starts + schedule.steps_per_frame - 1, start=prompt):
            if frame - self.base_frame >= self.window:
                self._slide(frame, stream, min(row.position for row in steps[first]))
            base = self.base_frame * length
            shifted = [
                [
                    row._replace(
                        source=row.source - base,
                        position=row.position - base,
                        sink=row.sink - base if row.sink >= 0 else -1,
                    )
                    for row in step
                ]
                for step in steps[first : int(end) + 1]
            ]
            self._decode(shifted, stream[base:])
            first = int(end) + 1

    def _decode(self, steps: list[list[Row]], tokens: np.ndarray) -> None:
        """As ``FullRecompute.run``, with a rule for the first cell of a frame."""
        for rows in steps:
            for position, logits in self.decoder._step(rows, tokens).items():
                starts_frame = (position - self.layout.first_cell(0)) % self.layout.frame_length == 0
                low = self.first if starts_frame else self.sampled.start
                tokens[position] = low + int(logits[low : self.sampled.stop].argmax())

    def _slide(self, frame: int, stream: np.ndarray, fed: int) -> None:
        while frame - self.base_frame >= self.window:
            self.base_frame += self.roll
        base = self.base_frame * self.layout.frame_length
        self.decoder, self.slides = self.fresh(), self.slides + 1
        prefix = self.layout.prefix
        kept = [(p, p) for p in range(prefix)] + [(p, p - base) for p in range(prefix + base, fed)]
        self.decoder.fed = [Fed(int(stream[source]), position, 0) for source, position in kept]
        self.decoder.step = 1
