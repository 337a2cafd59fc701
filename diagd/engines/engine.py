"""What the runtime asks of a backend that executes step graphs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diagd.bundle import Form

Int = NDArray[np.int32]
Float = NDArray[np.float32]

VOID = np.iinfo(np.int32).max
"""Slot position of an empty or voided slot: no query ever sees it."""


@dataclass(frozen=True)
class SamplingState:
    """What the sampler follows; ``top_k`` 0 and ``top_p`` 1 switch a rule off, temperature 0 all of them.

    Attributes:
        seed: 0 <= seed < 2**64; of the noise.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Steps:
    """Forward passes to run one after another, their rows in flat arrays.

    Row r of step n is in ``offsets[n]:offsets[n+1]``; likewise for the rows that decode and the slots that
    change. All arrays but ``cells`` are int32.

    Attributes:
        offsets: [N + 1].
        sources: [rows], places in the token buffer of the fed ids.
        positions: [rows], rotary positions.
        decode_offsets, decoded: [N + 1], [D], rows of each step whose prediction is wanted, from 0.
        sinks: [D], places in the token buffer that these predictions fill.
        cells: int64 [D], their positions, counted from the start of the stream: those of their noise.
        write_index: [N], first slot each step writes.
        live: [N], slots in use once the step is written; none beyond is visible.
        update_offsets, update_slots, update_positions: [N + 1], [U], [U], slots whose position changes ahead
            of each step, its own rows included; no slot twice in a step.
        sampling: how predictions become tokens.
    """

    offsets: Int
    sources: Int
    positions: Int
    decode_offsets: Int
    decoded: Int
    sinks: Int
    cells: NDArray[np.int64]
    write_index: Int
    live: Int
    update_offsets: Int
    update_slots: Int
    update_positions: Int
    sampling: SamplingState

    @classmethod
    def single(
        cls,
        sources: Int,
        positions: Int,
        decoded: Int,
        sinks: Int,
        write_index: int,
        live: int,
        sampling: SamplingState = SamplingState(),
    ) -> Steps:
        """One pass that changes no slot but its own, and decodes what follows its rows."""
        slots = write_index + np.arange(len(positions), dtype=np.int32)
        rows, draws = _whole(len(positions)), _whole(len(decoded))
        start, used = np.array([write_index], np.int32), np.array([live], np.int32)
        cells = positions[decoded].astype(np.int64) + 1
        return cls(
            *(rows, sources, positions, draws, decoded, sinks, cells),
            *(start, used, rows, slots, positions, sampling),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def parts(self, n: int) -> tuple[slice, slice, slice]:
        """Where step ``n`` has its rows, its rows that decode and its slots that change."""
        bounds = self.offsets, self.decode_offsets, self.update_offsets
        rows, drawn, changed = (slice(*ends[n : n + 2].tolist()) for ends in bounds)
        return rows, drawn, changed


def _whole(count: int) -> Int:
    return np.array([0, count], np.int32)


class Clock(Protocol):
    """Time stamps between the steps of an engine."""

    def mark(self, number: int) -> None:
        """Note when everything asked for so far is done; a number used again has the later time."""

    def seconds(self, first: int, last: int) -> float:
        """From one time stamp to another; waits for both."""


class HostClock(Clock):
    """Of an engine that is done when its step returns."""

    def __init__(self) -> None:
        self._marks: dict[int, float] = {}

    @override
    def mark(self, number: int) -> None:
        self._marks[number] = time.perf_counter()

    @override
    def seconds(self, first: int, last: int) -> float:
        return self._marks[last] - self._marks[first]


class Engine(Protocol):
    """One compiled backend over preallocated KV buffers and token buffers of its own, those of B streams.

    A stream is called by its lane, from 0; a pass is one for all lanes that take part in it.

    Attributes:
        form: of its step graph.
        streams: B.
        capacity: slots of the KV buffers of each stream.
        max_width: widest step of a stream.
        ahead: steps may still be running when ``step`` returns.
        clock: gives the times of its steps.
    """

    form: Form
    streams: int
    capacity: int
    max_width: int
    ahead: bool
    clock: Clock

    def padded_widths(self, widths: Int) -> Int:
        """Rows that steps of so many are run as, pad rows included; the same where the width is dynamic."""
        return widths

    def written_widths(self, widths: Int) -> Int:
        """Slots that steps of so many rows may write, pad rows included."""
        return self.padded_widths(widths)

    def send(self, steps: Steps, parts: Sequence[int] | None = None, lane: int = 0) -> None:
        """Take the steps to run next; those sent before have run.

        Args:
            steps: of a block.
            parts: ends of parts; nobody looks at, or writes, anything between the steps of one, so that an
                engine of one stream may run all of it at the first. None: each step is a part.
            lane: of the stream.
        """

    def step(self, lanes: Sequence[int] = (0,)) -> None:
        """Run, or queue, the next step of some lanes in one pass; K/V rows are written in place."""

    def draw(self) -> None:
        """Draw the tokens of the pass just run and write them to its sinks, where ``step`` did not.

        Raises:
            EngineError: a row's largest logit is not finite. An engine that runs ahead of the host says so
                when tokens are read.
        """
        return

    def logits(self, lane: int = 0) -> Float:
        """Logits [R, V] of a lane's rows that the last pass decodes, once it has run, until the next one."""

    def watched(self) -> Mapping[str, NDArray[Any]]:
        """Further outputs [rows, ...] of the last pass by name, where the engine was opened to watch some."""
        return {}

    def write_tokens(self, places: Int, ids: Int, lane: int = 0) -> None:
        """Put ids into a token buffer, for steps run from now on."""

    def read_tokens(self, places: Int, lane: int = 0) -> Int:
        """Ids in a token buffer once every step so far has run."""

    def write_slots(self, slot_position: Int, lane: int = 0) -> None:
        """Take the position of every slot, int32 [capacity]."""

    def set_text(self, rows: Mapping[str, NDArray[np.generic]]) -> None:
        """Take the keys and values of a text, by input of the step graph; for models that read text."""

    def rotate_keys(self, angles: NDArray[np.float64], live: int, lane: int = 0) -> None:
        """Turn the keys of slots below ``live`` by ``angles`` (radians, one per channel pair)."""

    def evaluate(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run the step graph on given inputs, as by its own contract; what the engine held is lost.

        ``feeds``: arrays by input, as wide as ``padded_widths`` says. ``outputs``: to give back.
        """

    def memory_used(self) -> int:
        """Bytes of its device that are in use, those of other programs included; 0 for the host's memory."""
        return 0

    def close(self) -> None:
        """Give the memory back; the engine is dead then."""
