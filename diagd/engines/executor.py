"""The executor of step graphs of fixed width: state lives on a device, and nothing waits for it unasked."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from diagd.bundle import Form, Manifest
from diagd.engines.buffers import rotate_pairs
from diagd.engines.devices.device import Array, Device
from diagd.engines.devices.kernels import (
    ADVANCE,
    ADVANCE_POINTERS,
    APPEND,
    SAMPLE,
    AdvanceArguments,
    AppendArguments,
    SampleArguments,
)
from diagd.engines.engine import VOID, Clock, Float, Int, Steps
from diagd.engines.program import MakeProgram
from diagd.engines.records import RecordRing
from diagd.engines.sampler import cell_ranges, refusal
from diagd.engines.tensors import WIDTH, StepTensors
from diagd.errors import EngineError

INPUTS = ("token_buffer", *ADVANCE_POINTERS[2:])
"""Inputs of step graphs beside caches and texts: all but what ``advance`` alone reads."""

APPEND_BLOCKS = 64
CURSOR_BYTES = 8  # where the next step's header begins, and that of the step that runs

TOGETHER = 64
"""Most steps of one graph: a frame of few steps is one launch, and one of many takes little memory."""

MOST_SEQUENCES = 64
"""Sequences of widths that are remembered, so that the second time they come they are captured."""


class Executor:
    """Runs a program over buffers on a device.

    Records of a block of steps go up in one copy; a step is then one graph: ``advance`` spreads its record
    over the tensors that the program reads, the program runs, ``sample`` makes tokens of its logits, and
    tokens and rows go where the next step reads them. Steps between which nobody looks, as those of a frame
    of a schedule, are one graph once their widths have come in the same sequence before. Nothing waits for
    the device but ``read_tokens``, ``logits`` and ``watched``.

    Args:
        manifest: of the bundle.
        form: ``modern`` or ``portable``.
        capacity: slots of the K/V buffers.
        widths: widths the program was compiled for.
        tokens: size of the token buffer.
        device: where it runs; closed with the engine.
        make_program: binds the compiled graph to the tensors.
        graphs: capture each width once and replay it.
        watch: further outputs of the graph, [W, channels], with their channels and element type; None for a
            tensor that a step has anyway.
    """

    def __init__(
        self,
        manifest: Manifest,
        form: Form,
        capacity: int,
        widths: tuple[int, ...],
        tokens: int,
        device: Device,
        make_program: MakeProgram,
        *,
        graphs: bool = True,
        watch: Mapping[str, tuple[int, DTypeLike] | None] | None = None,
    ) -> None:
        self.widths, self.max_width, self.capacity, self.form = widths, widths[-1], capacity, form
        known = np.asarray(widths, np.int32)
        self._padding = known[np.searchsorted(known, np.arange(self.max_width + 1))]
        self.device, self.ahead = device, device.ahead
        self.clock: Clock = _DeviceClock(device)
        self._watch = dict(watch or {})
        self.tensors = StepTensors(manifest, form, capacity, self.max_width, tokens, device, self._watch)
        self._tokens: Int = device.host_array((self.tensors.refusal_place + 2,), np.int32)
        self._staged: Int = device.host_array((tokens,), np.int32)
        self._staged_until = 0
        self._slots: Int = device.host_array((capacity,), np.int32)
        self._logits: Float = device.host_array((self.max_width, manifest.output_vocabulary), np.float32)
        self._records = RecordRing(device)
        self._cursor = device.allocate(CURSOR_BYTES)
        self._manifest, self._ranges = manifest, self._upload(cell_ranges(manifest))
        self._program = make_program(self.tensors.named)
        self._graphs: dict[tuple[int, ...], int | None] = {}  # of widths, None where they came once
        self._next = self._queued = self._sent = 0
        self._thread = threading.get_ident()
        self._warm_up(graphs and self._program.capturable)

    def close(self) -> None:
        """Give back the program and everything on the device; see ``Engine.close``."""
        self._wait()
        del self._program
        self.device.close()

    def padded_widths(self, widths: Int) -> Int:
        """The narrowest width that holds each; see ``Engine.padded_widths``."""
        return self._padding[widths]

    def send(self, steps: Steps, parts: Sequence[int] | None = None) -> None:
        """Queue the records of the steps to run next; see ``Engine.send``."""
        if self._queued != self._sent:  # some of those sent before will never run: forget their records
            self._wait()
            self._records.restart()
            self.device.clear(self._cursor, CURSOR_BYTES)
        self._steps, self._next, self._queued, self._sent = steps, 0, 0, 0
        self._padded = tuple(self.padded_widths(np.diff(steps.offsets)).tolist())
        self._parts = iter(range(1, len(steps) + 1) if parts is None else parts)

    def step(self) -> None:
        """Queue one pass, and those of its part; see ``Engine.step``.

        Raises:
            EngineError: on another thread than the one that opened the engine, which holds what it captured.
        """
        if self.ahead and threading.get_ident() != self._thread:
            raise EngineError(
                f"a step came from thread {threading.get_ident()}, the engine was opened in {self._thread}, "
                "which holds its captured graphs; open the session in the thread that decodes"
            )
        if self._next == self._queued:
            self._queue(next(self._parts))
        self._next += 1

    def _queue(self, end: int) -> None:
        """Queue the steps up to one."""
        while self._queued < end:
            if self._queued == self._sent:
                if self._records.is_full:
                    self._wait()
                self._sent = self._records.send(self._steps, self._sent)
            last = min(end, self._sent, self._queued + TOGETHER)
            self._launch(self._padded[self._queued : last])
            self._queued = last

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
            self._forward(*widths)
        else:
            for width in widths:
                self._launch((width,))

    def _capture(self, widths: tuple[int, ...]) -> int:
        def work() -> None:
            for width in widths:
                self._forward(width)

        return self.device.capture(work)

    def draw(self) -> None:
        """The step has drawn; see ``Engine.draw``."""

    def logits(self) -> Float:
        """Of the last step; see ``Engine.logits``."""
        steps, n = self._steps, self._next - 1
        width = self._padded[n]
        self.device.download(self._logits[:width], self.tensors.named["logits"].address)
        self._wait()
        return self._logits[steps.decoded[steps.decode_offsets[n] : steps.decode_offsets[n + 1]]]

    def watched(self) -> Mapping[str, Array]:
        """Further outputs; see ``Engine.watched``."""
        n = self._next - 1
        rows = int(self._steps.offsets[n + 1] - self._steps.offsets[n])
        named = self.tensors.named
        return {
            name: array.take(range(rows), axis=named[name].shape.index(WIDTH))
            for name, array in self._download(self._watch, self._padded[n]).items()
        }

    def inputs(self) -> dict[str, Array]:
        """What the program read in the last step, by name; of the K/V rows those that it wrote as well."""
        names = [*INPUTS, *(f"past_{name}" for name in self.tensors.cache), *self.tensors.text]
        return self._download(names, self._padded[self._next - 1])

    def evaluate(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run the program alone on given inputs; see ``Engine.evaluate``."""
        named, width = self.tensors.named, len(feeds["sources"])
        for name, array in feeds.items():
            self.device.upload(named[name].address, np.ascontiguousarray(array, named[name].dtype))
            self._wait()
        self._program.enqueue(width)
        return self._download(outputs, width)

    def memory_used(self) -> int:
        """Of the device; see ``Engine.memory_used``."""
        return self.device.memory_used()

    def write_tokens(self, places: Int, ids: Int) -> None:
        """Queue ids into the token buffer, neighbours in one copy; see ``Engine.write_tokens``."""
        if self._staged_until + len(ids) > len(self._staged):
            self._wait()  # copies may still read what is staged
        staged = self._staged[self._staged_until : self._staged_until + len(ids)]
        staged[:] = ids
        self._staged_until += len(ids)
        base = self.tensors.token_buffer.address
        bounds = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
        for first, last in pairwise(bounds):
            if first < last:
                self.device.upload(base + 4 * int(places[first]), staged[first:last])

    def read_tokens(self, places: Int) -> Int:
        """Ids once every step queued has run; see ``Engine.read_tokens``.

        Raises:
            EngineError: a row's largest logit was not finite.
        """
        address, place = self.tensors.token_buffer.address, self.tensors.refusal_place
        first, last = (int(places.min()), int(places.max()) + 1) if len(places) else (0, 1)
        self.device.download(self._tokens[first:last], address + 4 * first)
        self.device.download(self._tokens[place:], address + 4 * place)
        self._wait()
        largest, row = self._tokens[place:].tolist()
        if row:
            self.device.clear(address + 4 * place, 8)
            raise refusal(row - 1, float(np.int32(largest).view(np.float32)))
        return self._tokens[places]

    def write_slots(self, slot_position: Int) -> None:
        """Queue the position of every slot; see ``Engine.write_slots``."""
        self._wait()  # the copy before may still read the staging array
        self._slots[:] = slot_position
        self.device.upload(self.tensors.named["slot_position"].address, self._slots)

    def set_text(self, rows: Mapping[str, Array]) -> None:
        """Take a text; see ``Engine.set_text``."""
        for name, tensor in self.tensors.text.items():
            self.device.upload(tensor.address, np.ascontiguousarray(rows[name], tensor.dtype))
            self._wait()

    def rotate_keys(self, angles: NDArray[np.float64], live: int) -> None:
        """Turn cached keys; see ``Engine.rotate_keys``. Once per context, so the host does it."""
        for name, tensor in self.tensors.cache.items():
            if not name.startswith("key"):
                continue
            keys = np.empty(tensor.shape, tensor.dtype)
            self.device.download(keys, tensor.address)
            self._wait()
            rotate_pairs(keys[:, :, :live], angles)
            self.device.upload(tensor.address, keys)
            self._wait()

    def _forward(self, width: int) -> None:
        """Queue everything a step of one width consists of."""
        device, threads = self.device, self.device.threads
        device.launch(ADVANCE, self._advance_arguments(width), 1, threads)
        self._program.enqueue(width)
        device.launch(SAMPLE, self._sample_arguments(width), width, threads)
        if self.tensors.row_pointers:
            device.launch(APPEND, self._append_arguments(width), APPEND_BLOCKS, threads)

    def _warm_up(self, capture: bool) -> None:
        """Run every width once on a record without rows, capture it, and forget what that wrote."""
        nothing = np.zeros(0, np.int32)
        empty = Steps.single(nothing, nothing, nothing, nothing, 0, 1)
        for width in self.widths:
            self._records.send(empty, 0)
            self._forward(width)
            self._wait()
            if capture:
                self._graphs[width,] = self._capture((width,))
        self.tensors.clear()
        self.device.clear(self._cursor, CURSOR_BYTES)
        self._records.restart()
        self.write_slots(np.full(self.capacity, VOID, np.int32))
        self._wait()

    def _wait(self) -> None:
        self.device.synchronise()
        self._records.drained()
        self._staged_until = 0

    def _download(self, names: Sequence[str] | Mapping[str, Any], width: int) -> dict[str, Array]:
        named = self.tensors.named
        results = {name: np.empty(named[name].at_width(width), named[name].dtype) for name in names}
        for name, array in results.items():
            self.device.download(array, named[name].address)
        self._wait()
        return results

    def _advance_arguments(self, width: int) -> AdvanceArguments:
        addresses = {
            name: self.tensors.named[name].address for name in ADVANCE_POINTERS if name in self.tensors.named
        }
        return AdvanceArguments(
            records=self._records.address,
            cursor=self._cursor,
            **addresses,
            width=width,
        )

    def _sample_arguments(self, width: int) -> SampleArguments:
        layout, tensors = self._manifest.layout, self.tensors
        return SampleArguments(
            records=self._records.address,
            cursor=self._cursor,
            logits=tensors.named["logits"].address,
            ranges=self._ranges,
            token_buffer=tensors.token_buffer.address,
            refused=tensors.token_buffer.address + 4 * tensors.refusal_place,
            prefix=layout.prefix,
            frame_length=layout.frame_length,
            vocabulary=self._manifest.output_vocabulary,
            keep_crossing=self._manifest.sampling.keep_crossing,
            width=width,
        )

    def _upload(self, table: Int) -> int:
        """Address of a copy on the device."""
        address = self.device.allocate(table.nbytes)
        staged = self.device.host_array(table.shape, np.int32)
        staged[:] = table
        self.device.upload(address, staged)
        return address

    def _append_arguments(self, width: int) -> AppendArguments:
        tensors = self.tensors
        buffer = next(iter(tensors.cache.values()))
        row_bytes = buffer.shape[3] * buffer.dtype.itemsize
        return AppendArguments(
            rows=tensors.row_pointers,
            buffers=tensors.buffer_pointers,
            write_index=tensors.named["write_index"].address,
            tensors=len(tensors.cache),
            groups=buffer.shape[1],
            capacity=buffer.shape[2],
            width=width,
            row_chunks=row_bytes // self.device.chunk_bytes,
        )


class _DeviceClock(Clock):
    """Time stamps on the stream of a device, between the steps queued."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def mark(self, number: int) -> None:
        """Queue a time stamp."""
        self._device.mark(number)

    def seconds(self, first: int, last: int) -> float:
        """From one time stamp to another; waits for both."""
        self._device.synchronise()
        return self._device.seconds(first, last)
