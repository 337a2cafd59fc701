"""The ``prefix`` form on ONNX Runtime's CPU provider: cost follows the slots in use."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from math import prod
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diagd.bundle import Bundle, Form, Manifest
from diagd.engines.backend import StepOptions, graphs_of
from diagd.engines.devices.kernels import address
from diagd.engines.engine import VOID, Clock, Engine, Float, HostClock, Int, SamplingState, Steps
from diagd.engines.onnxruntime_session import check_values, open_step_session, run_bound
from diagd.engines.sampler import HostSampler
from diagd.engines.tensors import aligned_zeros, cache_tensors, rotate_pairs, text_buffers

if TYPE_CHECKING:
    import onnxruntime

GRANULE = 32
"""Slots by which the bound prefix grows: most steps then bind the same K/V shapes as the step before."""

MAX_WIDTH = 256
"""Rows of the widest pass; the prompt is fed in chunks of it, which bounds the scores' memory."""

LEAST_WIDTH = 80
"""Rows that a step may have however many streams share the pass: enough for every schedule of a family."""

_POSITIONS: Final = "slot_position"


Bounds: TypeAlias = tuple[int, int, int, int, int, int, int]
"""A step's number; the first and last of its rows, of those that decode and of its slot changes."""


class _Sent:
    """The steps that streams were sent, and the next of each.

    What they say stands stream beside stream: of those in step, all of a pass is copied at once.

    Attributes:
        rows: int32 [2, B, n], places of their ids in the buffer of all streams, and positions.
        drawn: int32 [4, B, n], of those that decode: numbers in their steps, the places that they fill, and
            the lowest ids they may be and one past the highest.
        keys: uint64 [2, B, n], cells and seeds of those that decode.
        changes: int32 [2, B, n], slots that change, and their positions.
        write_index: int64 [1, B, n], first slot of each step.
        sampling: of each stream.
        rules: temperature, top-k and top-p of each stream; those by the same ones draw together.
        live: of each stream, slots in use after the last step that was taken.
    """

    def __init__(self, streams: int) -> None:
        self.rows, self.drawn, self.changes = (np.zeros((n, streams, 0), np.int32) for n in (2, 4, 2))
        self.keys = np.zeros((2, streams, 0), np.uint64)
        self.write_index = np.zeros((1, streams, 0), np.int64)
        self.sampling: dict[int, SamplingState] = {}
        self.rules: dict[int, tuple[float, int, float]] = {}
        self.live, self._next = [0] * streams, [0] * streams
        self._bounds: dict[int, list[Bounds]] = {}
        self._lives: dict[int, list[int]] = {}

    def add(self, lane: int, steps: Steps, first_place: int, ranges: Int) -> None:
        """Get the steps of a stream whose tokens begin at a place, and the ids [2, D] that cells may be."""
        count, of_draws, by = len(steps.positions), len(steps.sinks), steps.sampling
        of_changes = len(steps.update_slots)
        if (most := max(len(steps), count, of_changes)) > self.rows.shape[2]:
            self._widen(most)
        self.write_index[0, lane, : len(steps)] = steps.write_index
        rows, changes = self.rows[:, lane, :count], self.changes[:, lane, :of_changes]
        rows[0], rows[1] = steps.sources + first_place, steps.positions
        changes[0], changes[1] = steps.update_slots, steps.update_positions
        drawn, keys = self.drawn[:, lane, :of_draws], self.keys[:, lane, :of_draws]
        drawn[0], drawn[1], drawn[2:] = steps.decoded, steps.sinks + first_place, ranges
        keys[0], keys[1] = steps.cells, by.seed
        ends = steps.offsets.tolist(), steps.decode_offsets.tolist(), steps.update_offsets.tolist()
        sides = (side for end in ends for side in (end, end[1:]))
        self._bounds[lane] = list(zip(range(len(steps)), *sides, strict=False))
        self._lives[lane], self._next[lane], self.sampling[lane] = steps.live.tolist(), 0, by
        self.rules[lane] = by.temperature, by.top_k, by.top_p

    def _widen(self, places: int) -> None:
        for name in ("rows", "drawn", "keys", "changes", "write_index"):
            table = getattr(self, name)
            setattr(self, name, np.pad(table, ((0, 0), (0, 0), (0, places - table.shape[2]))))

    def take(self, lanes: Sequence[int]) -> list[tuple[slice, Bounds]]:
        """The next step of each of some lanes, in order: neighbours in step, and where theirs are."""
        taken: list[tuple[slice, Bounds]] = []
        for lane in lanes:
            step = self._next[lane]
            bounds, self.live[lane] = self._bounds[lane][step], self._lives[lane][step]
            self._next[lane] = step + 1
            if taken and (taken[-1][0].stop, taken[-1][1]) == (lane, bounds):
                taken[-1] = slice(taken[-1][0].start, lane + 1), bounds
            else:
                taken.append((slice(lane, lane + 1), bounds))
        return taken


class PrefixState(Engine):
    """What an engine of the ``prefix`` form keeps on the host, and what is done with it between steps.

    Attributes:
        token_buffer: int32 [B * tokens].
        slot_position: int32 [capacity * B], slot by slot.
        buffers: K/V rows [capacity, B * G, D] by ``key_0``, ``value_0``, ...
    """

    form = Form.PREFIX
    ahead = False

    def __init__(
        self, manifest: Manifest, capacity: int, tokens: int, max_width: int, streams: int = 1
    ) -> None:
        self.capacity, self.max_width, self.streams = capacity, max_width, streams
        self.clock: Clock = HostClock()
        self.token_buffer: Int = np.zeros(streams * tokens, np.int32)
        held = capacity if streams == 1 else capacity + GRANULE  # with slots for rows that are nobody's
        self.slot_position: Int = np.full(held * streams, VOID, np.int32)
        self._groups, self._tokens = manifest.cache.kv_heads, tokens
        layers, dtype = manifest.cache.layers, np.dtype(manifest.cache.dtype)
        shape = (2, held, streams * self._groups, manifest.cache.head_size)
        # K and V in one block: from 4 MB on NumPy asks for pages of 2 MB. One of all layers may be more than
        # a system promises, though what is not in use takes no memory.
        blocks = (aligned_zeros(shape, dtype) for _ in range(layers))
        self.buffers: dict[str, NDArray[np.generic]] = dict(
            zip(cache_tensors(layers), chain.from_iterable(blocks), strict=True)
        )
        rows = streams * max_width
        self._sampler = HostSampler(manifest, rows)
        self._logit_rows, self._sinks, *_ = self._sampler.drawn
        self._text = text_buffers(manifest)
        self._session: Any = None
        self._sent = _Sent(streams)
        self._ran: dict[int, tuple[int, int]] = {}  # rows of the logits of those in the last pass
        self._logits: Float

    @override
    def send(self, steps: Steps, parts: Sequence[int] | None = None, lane: int = 0) -> None:
        self._sent.add(lane, steps, lane * self._tokens, self._sampler.ranges_of(steps.cells))

    def _begin_draws(self, lanes: slice, first: int, last: int, at: int) -> int:
        """Have rows of lanes draw from the logits from ``at`` on; how many these are."""
        sent, by = self._sent, self._sampler
        own, count = range(lanes.start, lanes.stop), last - first
        here = slice(at, at + len(own) * count)
        by.drawn[:, here].reshape(4, len(own), count)[:] = sent.drawn[:, lanes, first:last]
        by.keys[:, here].reshape(2, len(own), count)[:] = sent.keys[:, lanes, first:last]
        for lane in own:
            self._ran[lane] = at, at + count
            at += count
        return len(own) * count

    @override
    def draw(self) -> None:
        for _, group in groupby(self._ran, self._sent.rules.__getitem__):
            lanes = list(group)
            rows = slice(self._ran[lanes[0]][0], self._ran[lanes[-1]][1])
            by = self._sent.sampling[lanes[0]]
            self.token_buffer[self._sinks[rows]] = self._sampler.draw(self._logits[rows], rows, by)

    @override
    def logits(self, lane: int = 0) -> Float:
        first, last = self._ran[lane]
        return self._logits[first:last]

    @override
    def write_tokens(self, places: Int, ids: Int, lane: int = 0) -> None:
        self.token_buffer[places + lane * self._tokens] = ids

    @override
    def read_tokens(self, places: Int, lane: int = 0) -> Int:
        return self.token_buffer[places + lane * self._tokens]

    @override
    def write_slots(self, slot_position: Int, lane: int = 0) -> None:
        self.slot_position[: self.capacity] = slot_position

    @override
    def set_text(self, rows: Mapping[str, NDArray[np.generic]]) -> None:
        for name, buffer in self._text.items():
            buffer[:] = rows[name]

    @override
    def rotate_keys(self, angles: NDArray[np.float64], live: int, lane: int = 0) -> None:
        for name in self.buffers:
            if name.startswith("key"):
                rotate_pairs(self.rows(name, lane)[:live], angles)

    def rows(self, name: str, lane: int) -> NDArray[Any]:
        """A stream's rows [slots, G, D] of a buffer, of all slots in use at least, where they are now."""
        return self.buffers[name]

    @override
    def evaluate(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        return dict(zip(outputs, self._session.run(list(outputs), dict(feeds)), strict=True))

    @override
    def close(self) -> None:
        self._session = None
        self.buffers.clear()


class PlainPrefix(PrefixState):
    """Steps of one stream as arrays that are fed anew each time, nothing of them bound; see ``Engine``."""

    @override
    def step(self, lanes: Sequence[int] = (0,)) -> None:
        sent = self._sent
        ((lane, (n, first, last, drawn, drawn_last, changed, changed_last)),) = sent.take(lanes)
        (sources,), (positions,) = sent.rows[:, lane, first:last]
        slots, to = sent.changes[:, 0, changed:changed_last]
        self.slot_position[slots] = to
        feeds: dict[str, NDArray[Any]] = {
            "token_buffer": self.token_buffer,
            "sources": sources[None],
            "positions": positions[None],
            "slot_position": self.slot_position[:, None],
            "write_index": sent.write_index[0, lane, n] + np.arange(last - first)[None],
            "logit_rows": self._logit_rows[: self._begin_draws(lane, drawn, drawn_last, 0)],
            **self._text,
        }
        self._logits = self.forward(feeds, sent.live[0])

    @abstractmethod
    def forward(self, feeds: Mapping[str, NDArray[Any]], live: int) -> Float:
        """Run the graph and update the K/V rows; logits [R, V].

        ``feeds`` has the inputs but the K/V rows; ``live``: slots in use.
        """


class PrefixEngine(PrefixState):
    """K/V buffers [S, B, G, D], of which each pass binds the live prefix as input and output.

    The graph scatters a pass's rows into the bound input; because the output is bound to the same memory,
    ONNX Runtime writes in place and copies nothing. Streams that take part with fewer rows than the widest,
    or with none, have pad rows, which all go to a slot behind those in use. B are those that took part of
    late: the others' rows are set aside until they do, so that they cost nothing. That takes as long as a
    pass, and is done once a pass's worth was computed for nobody.
    """

    def __init__(self, bundle: Bundle, options: StepOptions) -> None:
        manifest, streams = bundle.manifest, options.streams
        graph = graphs_of(bundle, Form.PREFIX)[0]
        widest = max(MAX_WIDTH // streams, LEAST_WIDTH)
        slots = -(-options.slots // GRANULE) * GRANULE
        super().__init__(manifest, slots, options.tokens, widest, streams)
        self._session = open_step_session(bundle, graph, options.cpu)
        self._order: list[int] = [0] if streams == 1 else []  # lanes in the buffers, and in each of them
        self._orders = dict.fromkeys((*self.buffers, _POSITIONS), self._order)
        self._aside: dict[tuple[str, int], NDArray[Any]] = {}
        self._bound_most = self._idle = self._spread = 0
        check_values(self._session, self._shapes(manifest.output_vocabulary))
        self._binding = self._session.io_binding()
        rows = streams * widest
        self._logits = np.zeros((rows, manifest.output_vocabulary), np.float32)
        self._rows, self._slots = np.zeros((2, rows), np.int32), np.zeros((1, rows), np.int64)
        self._frontier: list[NDArray[Any]]  # of them what is bound, [2, B, W] and [1, B, W]
        self._range, self._columns = np.arange(widest), np.arange(streams)[:, None]
        self._fed: dict[str, NDArray[Any]]
        self._fed = {"sources": self._rows[0], "positions": self._rows[1], "write_index": self._slots[0]}
        self._values: dict[tuple[str, tuple[int, ...]], onnxruntime.OrtValue] = {}
        self._bound = self._bound_width = self._bound_rows = -1  # nothing yet, not even an empty step
        for name, buffer in {"token_buffer": self.token_buffer, **self._text}.items():
            self._bind_rows(name, buffer, buffer.shape)
        self._bind_rows("logits", self._logits, self._logits.shape, output=True)
        self._watch = tuple(options.watch or ())

    @override
    def step(self, lanes: Sequence[int] = (0,)) -> None:
        if self.streams > 1:
            self._take_in(lanes)
        taken = self._sent.take(sorted(lanes))
        width, count = max(last - first for _, (_, first, last, *_) in taken), 0
        self._bind_frontier(width)
        self._begin()
        self._ran.clear()
        for part, bounds in taken:
            count += self._copy(part, bounds, width, count)
        self._bind_logits(count)
        run_bound(self._session, self._binding)

    def _begin(self) -> None:
        """Bind the prefix of the longest stream, and have every row be a pad."""
        live = max(self._sent.live[number] for number in self._order)
        if self.streams == 1:
            self._bind_prefix(-(-live // GRANULE) * GRANULE)
        else:
            self._bind_prefix((live // GRANULE + 1) * GRANULE)
            self._frontier[0][:], self._frontier[1][:] = 0, self._bound - 1

    def _copy(self, lanes: slice, bounds: Bounds, width: int, at: int) -> int:
        """Have the pass be of a step of lanes; how many rows of it have logits, those from ``at`` on."""
        n, first, last, drawn, drawn_last, changed, changed_last = bounds
        sent, column = self._sent, self._order.index(lanes.start)
        columns = slice(column, column + lanes.stop - lanes.start)
        own, (rows, slots) = self._columns[columns], self._frontier
        rows[:, columns, : last - first] = sent.rows[:, lanes, first:last]
        slots[:, columns, : last - first] = sent.write_index[:, lanes, n, None] + self._range[: last - first]
        count = self._begin_draws(lanes, drawn, drawn_last, at)
        if column or len(own) > 1:
            self._logit_rows[at : at + count].reshape(len(own), -1)[:] += own * np.int32(width)
        changes, positions = sent.changes[:, lanes, changed:changed_last]
        self.slot_position[changes * len(self._order) + own] = positions
        return count

    @override
    def write_slots(self, slot_position: Int, lane: int = 0) -> None:
        used = np.flatnonzero(slot_position != VOID)
        self._sent.live[lane] = live = int(used[-1]) + 1 if used.size else 0
        if lane in self._orders[_POSITIONS]:
            self._column(_POSITIONS, lane)[: self.capacity, 0] = slot_position
        else:
            self._aside[_POSITIONS, lane] = slot_position[:live, None].copy()

    @override
    def rows(self, name: str, lane: int) -> NDArray[Any]:
        found = self._column(name, lane) if lane in self._orders[name] else self._aside[name, lane]
        return found.reshape(len(found), self._groups, -1)

    def _take_in(self, lanes: Sequence[int]) -> None:
        """Have the rows of some lanes in the buffers, and not for long those of others."""
        there = set(self._order)
        if not there.issuperset(lanes):
            self._lay_out(sorted(there.union(lanes)))
        self._idle += len(self._order) - len(lanes)
        if self._idle >= len(self._order):
            self._lay_out(sorted(lanes))

    def _lay_out(self, order: list[int]) -> None:
        """Have the rows of these lanes in the buffers, side by side, and the others' aside."""
        self._idle = 0
        if order == self._order:
            return
        self._order, live = [], max(self._sent.live)  # none until all are: the next step does what is left
        self._bound_most, self._spread = max(live, self._bound_most), max(len(order), self._spread)
        self._bound = self._bound_width = self._bound_rows = -1
        self._values.clear()  # a kilobyte each: those of all numbers of streams would be many
        for name in self._orders:
            for lane in self._orders[name]:
                self._aside[name, lane] = self._column(name, lane)[:live].copy()
            self._orders[name] = []
            self._interleaved(name, self._spread)[: self._bound_most] = VOID if name == _POSITIONS else 0
            interleaved = self._interleaved(name, len(order))
            for column, lane in enumerate(order):
                if (name, lane) in self._aside:
                    kept = self._aside[name, lane]
                    interleaved[: len(kept), column] = kept
            self._orders[name] = order
            for lane in order:
                self._aside.pop((name, lane), None)
        self._order, self._bound_most, self._spread = order, live, len(order)

    def _interleaved(self, name: str, lanes: int) -> NDArray[Any]:
        """A buffer, or the positions of slots, as [S, lanes, ...]."""
        buffer = self.slot_position if name == _POSITIONS else self.buffers[name]
        slots = len(self.buffers["key_0"])
        values = buffer.size // (slots * self.streams)
        return buffer.reshape(-1)[: slots * lanes * values].reshape(slots, lanes, values)

    def _column(self, name: str, lane: int) -> NDArray[Any]:
        """A stream's part [S, ...] of it."""
        order = self._orders[name]
        return self._interleaved(name, len(order))[:, order.index(lane)]

    @override
    def watched(self) -> Mapping[str, NDArray[Any]]:
        values = self.outputs
        first = len(values) - len(self._watch)  # outputs come in the order in which they were first bound
        return {name: value.numpy() for name, value in zip(self._watch, values[first:], strict=True)}

    @override
    def close(self) -> None:
        super().close()
        self._binding = None
        self._values.clear()

    def _shapes(self, vocabulary: int) -> dict[str, tuple[int, ...]]:
        """Of what a step binds, -1 where it depends on the step."""
        fed = {"token_buffer": (-1,), "logit_rows": (-1,), "logits": (-1, vocabulary)}
        rows = dict.fromkeys(("sources", "positions", _POSITIONS, "write_index"), (-1, -1))
        cached = {
            f"past_{name}": (-1, -1, self._groups, buffer.shape[2]) for name, buffer in self.buffers.items()
        }
        return {**fed, **rows, **cached, **{name: buffer.shape for name, buffer in self._text.items()}}

    def _bind_prefix(self, length: int) -> None:
        if length == self._bound:
            return
        self._bound = -1  # until all of them are
        shape = (length, len(self._order))
        for name, buffer in self.buffers.items():
            value = self._value(name, buffer, (*shape, self._groups, buffer.shape[2]))
            self._binding.bind_ortvalue_input(f"past_{name}", value)
            self._binding.bind_ortvalue_output(f"present_{name}", value)
        positions = self._value(_POSITIONS, self.slot_position, shape)
        self._binding.bind_ortvalue_input(_POSITIONS, positions)
        self._bound, self._bound_most = length, max(self._bound_most, length)

    def _bind_frontier(self, width: int) -> None:
        if width == self._bound_width:
            return
        self._bound_width = -1
        shape = (len(self._order), width)
        for name, array in self._fed.items():
            self._binding.bind_ortvalue_input(name, self._value(name, array, shape))
        arrays, rows = (self._rows, self._slots), prod(shape)
        self._frontier = [array[:, :rows].reshape(len(array), *shape) for array in arrays]
        self._bound_width = width

    def _bind_logits(self, rows: int) -> None:
        if rows != self._bound_rows:
            self._bound_rows = -1
            wanted = self._value("logit_rows", self._logit_rows, (rows,))
            self._binding.bind_ortvalue_input("logit_rows", wanted)
            logits = self._value("logits", self._logits, (rows, self._logits.shape[1]))
            self._binding.bind_ortvalue_output("logits", logits)
        for name in self._watch:  # their size follows the step's: the memory is ONNX Runtime's
            self._binding.bind_output(name, "cpu")
        self._bound_rows = rows

    def _value(self, name: str, buffer: NDArray[Any], shape: tuple[int, ...]) -> onnxruntime.OrtValue:
        """The start of a buffer, kept for each shape: binding it anew takes three to six times as long."""
        if (name, shape) not in self._values:
            from onnxruntime import OrtValue

            start = buffer.reshape(-1)[: prod(shape)].reshape(shape)
            self._values[name, shape] = OrtValue.ortvalue_from_numpy(start)
        return self._values[name, shape]

    def _bind_rows(
        self, name: str, buffer: NDArray[Any], shape: tuple[int, ...], *, output: bool = False
    ) -> None:
        """Bind the start of a buffer that lives as long as the engine."""
        bind = self._binding.bind_output if output else self._binding.bind_input
        bind(name, "cpu", 0, buffer.dtype, shape, address(buffer))

    @property
    def outputs(self) -> list[onnxruntime.OrtValue]:
        """Values bound to the outputs of the last step, in the order in which they were first bound."""
        values: list[onnxruntime.OrtValue] = self._binding.get_outputs()
        return values
