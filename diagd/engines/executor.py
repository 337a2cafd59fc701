"""The executor of step graphs of fixed width: state lives on a device, and nothing waits for it unasked."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diagd.bundle import Manifest
from diagd.bundle.manifest import StepGraph
from diagd.engines.backend import StepOptions
from diagd.engines.devices import Array, Device
from diagd.engines.devices.kernels import ADVANCE_POINTERS
from diagd.engines.engine import VOID, Clock, Engine, Float, Int, Steps
from diagd.engines.records import Lane, open_lanes
from diagd.engines.sampler import refusal
from diagd.engines.tensors import WIDTH, MakeProgram, StepTensors, rotate_pairs
from diagd.errors import EngineError

INPUTS = ("token_buffer", *ADVANCE_POINTERS[2:])
"""Inputs of step graphs beside caches and texts: all but what ``advance`` alone reads."""

TOGETHER = 64
"""Most steps of one graph: a frame of few steps is one launch, and one of many takes little memory."""

MOST_SEQUENCES = 64
"""Sequences of widths that are remembered, so that the second time they come they are captured."""


class Executor(Engine):
    """Runs a program over buffers on a device.

    Records of a block of steps go up in one copy; a step is then one graph: ``advance`` spreads its record
    over the tensors that the program reads, the program runs, ``sample`` makes tokens of its logits, and
    tokens and rows go where the next step reads them. Steps between which nobody looks, as those of a frame
    of a schedule, are one graph once their widths have come in the same sequence before. Nothing waits for
    the device but ``read_tokens``, ``logits`` and ``watched``. The device is closed with the engine; the
    program is bound for ``widths``, narrowest first.
    """

    def __init__(
        self,
        manifest: Manifest,
        graph: StepGraph,
        widths: tuple[int, ...],
        options: StepOptions,
        device: Device,
        make_program: MakeProgram,
    ) -> None:
        self.widths, self.max_width, self.form, self.streams = widths, widths[-1], graph.form, graph.streams
        capacity, streams, tokens = int(graph.capacity or 0), graph.streams, options.tokens
        self.capacity = capacity if streams == 1 else capacity - self.max_width  # the rest: see ``Lane``
        known = np.asarray(widths, np.int32)
        self._padding = known[np.searchsorted(known, np.arange(self.max_width + 1))]
        self.device, self.ahead = device, device.ahead
        self.clock: Clock = device
        self._watch = dict(options.watch or {})
        self.tensors = StepTensors(manifest, graph, self.max_width, tokens, device, self._watch)
        self._places = tokens
        self._tokens: Int = device.host_array((self.tensors.refusal_place + 2,), np.int32)
        self._staged: Int = device.host_array((tokens,), np.int32)
        self._staged_until = 0
        self._slots: Int = device.host_array((capacity,), np.int32)
        self._logits: Float = device.host_array((self.max_width, manifest.output_vocabulary), np.float32)
        self._lanes = open_lanes(device, self.tensors, manifest, self.capacity, self.max_width)
        self._program = make_program(self.tensors.named)
        self._graphs: dict[tuple[int, ...], int | None] = {}  # of widths, None where they came once
        self._width = 0
        self._thread = threading.get_ident()
        self._warm_up(options.graphs and self._program.capturable)

    @override
    def close(self) -> None:
        self._wait()
        del self._program
        self.device.close()

    @override
    def padded_widths(self, widths: Int) -> Int:
        """The narrowest width that holds each."""
        return self._padding[widths]

    @override
    def written_widths(self, widths: Int) -> Int:
        """As wide as another stream's step may be."""
        return self._padding[widths] if self.streams == 1 else np.full_like(widths, self.max_width)

    @override
    def send(self, steps: Steps, parts: Sequence[int] | None = None, lane: int = 0) -> None:
        own = self._lanes[lane]
        if own.queued != own.sent:  # some of those sent before will never run: forget their records
            self._wait()
            own.forget()
        if lane:  # a step graph looks ids up among those of all streams
            steps = replace(steps, sources=steps.sources + np.int32(lane * self._places))
        own.take(steps, self.padded_widths(np.diff(steps.offsets)), parts)

    @override
    def step(self, lanes: Sequence[int] = (0,)) -> None:
        """Queue one pass, and, of one stream alone, those of its part.

        Raises:
            EngineError: on another thread than the one that opened the engine, which holds what it captured.
        """
        if self.ahead and threading.get_ident() != self._thread:
            raise EngineError(
                f"a step came from thread {threading.get_ident()}, the engine was opened in {self._thread}, "
                "which holds its captured graphs; open the session in the thread that decodes"
            )
        if self.streams == 1:
            (own,) = self._lanes
            if own.next == own.queued:
                self._queue(own, next(own.parts))
            own.next += 1
            self._width = own.padded[own.next - 1]
        else:
            self._share(lanes)

    def _share(self, lanes: Sequence[int]) -> None:
        """Queue the next steps of some streams as one pass."""
        width = 0
        for lane in lanes:
            own = self._lanes[lane]
            self._upload_records(own)
            width = max(width, own.padded[own.queued])
            own.queued += 1
            own.next += 1
        self._width = width
        for lane, own in enumerate(self._lanes):
            if lane in lanes:
                own.wake()
            else:
                own.rest(width)
        if len(lanes) == self.streams:
            self._launch((width,))
        else:
            self._forward(width, lanes)

    def _upload_records(self, own: Lane) -> None:
        """Have the record of the step that is queued next on the device."""
        if own.queued == own.sent:
            if own.records.is_full:
                self._wait()
            own.sent = own.records.send(own.steps, own.sent)

    def _queue(self, own: Lane, end: int) -> None:
        """Queue the steps up to one."""
        while own.queued < end:
            self._upload_records(own)
            last = min(end, own.sent, own.queued + TOGETHER)
            self._launch(own.padded[own.queued : last])
            own.queued = last

    def _launch(self, widths: tuple[int, ...]) -> None:
        """Queue steps whose records are up, in as few graphs as there are."""
        known = self._graphs
        if len(widths) > 1 and (widths in known or 0 < len(known) < MOST_SEQUENCES):
            if widths in known and known[widths] is None:
                known[widths] = self._capture(widths)
            known.setdefault(widths)
        if (graph := known.get(widths)) is not None:
            self.device.replay(graph)
        elif len(widths) == 1:
            self._forward(*widths, range(self.streams))
        else:
            for width in widths:
                self._launch((width,))

    def _capture(self, widths: tuple[int, ...]) -> int:
        def work() -> None:
            for width in widths:
                self._forward(width, range(self.streams))

        return self.device.capture(work)

    @override
    def logits(self, lane: int = 0) -> Float:
        own, width = self._lanes[lane], self._width
        _, drawn, _ = own.steps.parts(own.next - 1)
        self.device.download(self._logits[:width], own.part("logits", width))
        self._wait()
        return self._logits[own.steps.decoded[drawn]]

    @override
    def watched(self) -> Mapping[str, Array]:
        (own,) = self._lanes  # none of a group is watched
        rows, _, _ = own.steps.parts(own.next - 1)
        named = self.tensors.named
        return {
            name: array.take(range(rows.stop - rows.start), axis=named[name].shape.index(WIDTH))
            for name, array in self._download(self._watch, self._width).items()
        }

    def inputs(self) -> dict[str, Array]:
        """What the program read in the last step, by name; of the K/V rows those that it wrote as well."""
        names = [*INPUTS, *(f"past_{name}" for name in self.tensors.cache), *self.tensors.text]
        return self._download(names, self._width)

    @override
    def evaluate(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        named, width = self.tensors.named, feeds["sources"].shape[-1]
        for name, array in feeds.items():
            self.device.upload(named[name].address, np.ascontiguousarray(array, named[name].dtype))
            self._wait()
        self._program.enqueue(width)
        return self._download(outputs, width)

    @override
    def memory_used(self) -> int:
        return self.device.memory_used()

    @override
    def write_tokens(self, places: Int, ids: Int, lane: int = 0) -> None:
        """Queue ids into the token buffer, neighbours in one copy."""
        if self._staged_until + len(ids) > len(self._staged):
            self._wait()  # copies may still read what is staged
        staged = self._staged[self._staged_until : self._staged_until + len(ids)]
        staged[:] = ids
        self._staged_until += len(ids)
        base = self._lanes[lane].part("token_buffer")
        bounds = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
        for first, last in pairwise(bounds):
            if first < last:
                self.device.upload(base + 4 * int(places[first]), staged[first:last])

    @override
    def read_tokens(self, places: Int, lane: int = 0) -> Int:
        """Ids once every step queued has run; EngineError where a row's largest logit was not finite."""
        address, place = self.tensors.token_buffer.address, self.tensors.refusal_place
        places = places + lane * self._places if lane else places
        first, last = (int(places.min()), int(places.max()) + 1) if len(places) else (0, 1)
        self.device.download(self._tokens[first:last], address + 4 * first)
        self.device.download(self._tokens[place:], address + 4 * place)
        self._wait()
        largest, row = self._tokens[place:].tolist()
        if row:
            self.device.clear(address + 4 * place, 8)
            raise refusal(row - 1, float(np.int32(largest).view(np.float32)))
        return self._tokens[places]

    @override
    def write_slots(self, slot_position: Int, lane: int = 0) -> None:
        self._wait()  # the copy before may still read the staging array
        self._slots[: self.capacity] = slot_position
        self._slots[self.capacity :] = VOID
        self._lanes[lane].idle_at = None
        self.device.upload(self._lanes[lane].part("slot_position"), self._slots)

    @override
    def set_text(self, rows: Mapping[str, Array]) -> None:
        for name, tensor in self.tensors.text.items():
            self.device.upload(tensor.address, np.ascontiguousarray(rows[name], tensor.dtype))
            self._wait()

    @override
    def rotate_keys(self, angles: NDArray[np.float64], live: int, lane: int = 0) -> None:
        """Turn cached keys. Once per context, so the host does it."""
        for name, tensor in self.tensors.cache.items():
            if not name.startswith("key"):
                continue
            keys = np.empty(tensor.shape[1:], tensor.dtype)
            address = self._lanes[lane].part(f"past_{name}")
            self.device.download(keys, address)
            self._wait()
            rotate_pairs(keys[:, :live], angles)
            self.device.upload(address, keys)
            self._wait()

    def _forward(self, width: int, lanes: Sequence[int]) -> None:
        """Queue everything a step of one width consists of."""
        for lane in lanes:
            self._lanes[lane].advance(width)
        self._program.enqueue(width)
        for lane in lanes:
            self._lanes[lane].sample(width)
        if self.tensors.rows:
            for lane in lanes:
                self._lanes[lane].append(width)

    def _warm_up(self, capture: bool) -> None:
        """Run every width once on a record without rows, capture it, and forget what that wrote."""
        nothing, lanes = np.zeros(0, np.int32), tuple(range(self.streams))
        empty = Steps.single(nothing, nothing, nothing, nothing, 0, 1)
        for width in self.widths:
            for own in self._lanes:
                own.records.send(empty, 0)
            self._forward(width, lanes)
            self._wait()
            if capture:
                self._graphs[width,] = self._capture((width,))
        self.tensors.clear()
        for lane, own in enumerate(self._lanes):
            own.forget()
            self.write_slots(np.full(self.capacity, VOID, np.int32), lane)
        self._wait()

    def _wait(self) -> None:
        self.device.synchronise()
        for own in self._lanes:
            own.records.drained()
        self._staged_until = 0

    def _download(self, names: Sequence[str] | Mapping[str, Any], width: int) -> dict[str, Array]:
        named = self.tensors.named
        results = {name: np.empty(named[name].at_width(width), named[name].dtype) for name in names}
        for name, array in results.items():
            self.device.download(array, named[name].address)
        self._wait()
        return results
