"""An engine whose state lives on a device: it queues steps and waits only when tokens are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Form, Manifest
from diagd.engines.buffers import rotate_pairs
from diagd.engines.cuda.device import Array, Device
from diagd.engines.cuda.kernels import (
    ADVANCE,
    ADVANCE_POINTERS,
    APPEND,
    CHUNK_BYTES,
    AdvanceArguments,
    AppendArguments,
)
from diagd.engines.cuda.program import MakeProgram
from diagd.engines.cuda.record import RECORDS, RecordRing
from diagd.engines.cuda.tensors import StepTensors
from diagd.engines.engine import VOID, Float, Int, SamplingState, StepInputs

THREADS = 256
APPEND_BLOCKS = 64


class DeviceEngine:
    """Runs a program over buffers on a device.

    A step is one short copy (its record) and one graph: ``advance`` spreads the record over the tensors that
    the program reads, the program runs, and its tokens and rows go where the next step reads them. The host
    runs ahead by up to ``RECORDS`` steps. ``token_buffer`` waits for the steps queued; what the runtime
    writes to it, and to ``slot_position``, reaches the device with the next step.

    Args:
        manifest: of the bundle.
        form: ``modern`` or ``portable``.
        capacity: slots of the K/V buffers.
        widths: widths the program was compiled for.
        tokens: size of the token buffer.
        device: where it runs.
        make_program: binds the compiled graph to the tensors.
        graphs: capture each width once and replay it.
        keep_logits: give back logits; every step then waits.
    """

    samples_in_graph = True

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
        keep_logits: bool = False,
    ) -> None:
        self.widths, self.max_width, self.capacity = widths, widths[-1], capacity
        self.keep_logits, self._device, self._form = keep_logits, device, form
        self.tensors = StepTensors(manifest, form, capacity, self.max_width, tokens, device)
        self.slot_position: Int = np.full(capacity, VOID, np.int32)
        self._device_slots: Int = self.slot_position.copy()
        self._staged_slots = device.host_array((capacity,), np.int32)
        self._tokens: Int = device.host_array((tokens,), np.int32)
        self._device_tokens: Int = self._tokens.copy()
        self._logits: Float = device.host_array((self.max_width, manifest.output_vocabulary), np.float32)
        # A step changes its own slots, the seeds of the step before, and a frame that is evicted.
        layout = manifest.layout
        updates = 2 * (layout.frame_length + layout.rows) + 4 * self.max_width
        self._records = RecordRing(device, self.max_width, updates, tokens - 1)
        self._counter = device.allocate(4)
        self._ahead, self._tokens_stale = 0, False
        self._program = make_program(self.tensors.named)
        self._graphs: dict[int, int] = {}
        self._warm_up(graphs and self._program.capturable)

    @property
    def device(self) -> Device:
        """Where it runs; time stamps on its stream lie between the steps queued."""
        return self._device

    @property
    def form(self) -> Form:
        """Of its step graph."""
        return self._form

    def close(self) -> None:
        """Give back the program and everything on the device; the engine and its arrays are dead then."""
        self._wait()
        del self._program
        self._device.close()

    def padded_width(self, width: int) -> int:
        """The narrowest width that holds ``width`` rows."""
        return next(padded for padded in self.widths if padded >= width)

    @property
    def token_buffer(self) -> Int:
        """Tokens once every step queued has run; writing to it changes what the next step reads."""
        if self._tokens_stale:
            self._device.download(self._tokens, self.tensors.token_buffer.address)
            self._wait()
            self._device_tokens[:] = self._tokens
            self._tokens_stale = False
        return self._tokens

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """Queue one pass; see ``Engine.step``. Without ``keep_logits`` the result has no rows."""
        if self._ahead == RECORDS - 1:
            self._wait()
        self._send_tokens()
        changed = self._changed_slots()
        self._records.send(inputs, sampling, changed, self.slot_position[changed])
        self._ahead, self._tokens_stale = self._ahead + 1, True
        width = self.padded_width(len(inputs.positions))
        if width in self._graphs:
            self._device.replay(self._graphs[width])
        else:
            self._forward(width)
        if not self.keep_logits:
            return self._logits[:0]
        self._device.download(self._logits[:width], self.tensors.named["logits"].address)
        self._device.synchronise()
        return self._logits[inputs.decoded]

    def evaluate(self, feeds: Mapping[str, Array], outputs: Sequence[str], width: int) -> dict[str, Array]:
        """Run the program alone on given inputs; what the engine knew of its stream is lost.

        Args:
            feeds: arrays by tensor name.
            outputs: tensors to give back.
            width: of the step.
        """
        named = self.tensors.named
        results = {name: np.empty(named[name].at_width(width), named[name].dtype) for name in outputs}
        for name, array in feeds.items():
            self._device.upload(named[name].address, np.ascontiguousarray(array, named[name].dtype))
            self._wait()
        self._program.enqueue(width)
        for name, array in results.items():
            self._device.download(array, named[name].address)
        self._wait()
        return results

    def set_text(self, rows: Mapping[str, Array]) -> None:
        """Take a text; see ``Engine.set_text``."""
        for name, tensor in self.tensors.text.items():
            self._device.upload(tensor.address, np.ascontiguousarray(rows[name], tensor.dtype))
            self._wait()

    def rotate_keys(self, angles: NDArray[np.float64], live: int) -> None:
        """Turn cached keys; see ``Engine.rotate_keys``. Once per context, so the host does it."""
        for name, tensor in self.tensors.cache.items():
            if not name.startswith("key"):
                continue
            keys = np.empty(tensor.shape, tensor.dtype)
            self._device.download(keys, tensor.address)
            self._wait()
            rotate_pairs(keys[:, :, :live], angles)
            self._device.upload(tensor.address, keys)
            self._wait()

    def _forward(self, width: int) -> None:
        """Queue everything a step of one width consists of."""
        self._device.launch(ADVANCE, self._advance_arguments(width), 1, THREADS)
        self._program.enqueue(width)
        tensors = self.tensors
        if self._form is Form.PORTABLE:
            self._device.launch(APPEND, self._append_arguments(width), APPEND_BLOCKS, THREADS)
        else:
            tokens = tensors.token_buffer
            self._device.copy(tokens.address, tensors.named["next_token_buffer"].address, 4 * tokens.shape[0])

    def _warm_up(self, capture: bool) -> None:
        """Run every width once on a record without rows, capture it, and forget what that wrote."""
        nothing = np.zeros(0, np.int32)
        empty = StepInputs(nothing, nothing, nothing, nothing, np.zeros(0, np.float32), 0, 1)
        for width in self.widths:
            self._records.send(empty, SamplingState(0.0, 0, 1.0), nothing, nothing)
            self._forward(width)
            self._device.synchronise()
            if capture:
                self._graphs[width] = self._device.capture(partial(self._forward, width))
        self.tensors.clear()
        self._device.clear(self._counter, 4)
        self._records.restart()
        self._staged_slots[:] = VOID
        self._device.upload(self.tensors.named["slot_position"].address, self._staged_slots)
        self._wait()

    def _wait(self) -> None:
        self._device.synchronise()
        self._ahead = 0

    def _send_tokens(self) -> None:
        """Upload what the runtime wrote, which it does only after asking for the tokens."""
        if not self._tokens_stale and not np.array_equal(self._tokens, self._device_tokens):
            self._device.upload(self.tensors.token_buffer.address, self._tokens)
            self._device_tokens[:] = self._tokens

    def _changed_slots(self) -> Int:
        """Slots whose position the device does not have yet; many at once go up as a whole."""
        changed = np.flatnonzero(self.slot_position != self._device_slots).astype(np.int32)
        if len(changed):
            self._device_slots[:] = self.slot_position
        if len(changed) <= self._records.max_updates:
            return changed
        self._device.synchronise()  # the staging array may still be on its way
        self._staged_slots[:] = self.slot_position
        self._device.upload(self.tensors.named["slot_position"].address, self._staged_slots)
        return changed[:0]

    def _advance_arguments(self, width: int) -> AdvanceArguments:
        addresses = {
            name: self.tensors.named[name].address for name in ADVANCE_POINTERS if name in self.tensors.named
        }
        return AdvanceArguments(
            records=self._records.address,
            counter=self._counter,
            **addresses,
            records_in_ring=RECORDS,
            max_width=self.max_width,
            max_updates=self._records.max_updates,
            width=width,
            scratch=self.tensors.token_buffer.shape[0] - 1,
        )

    def _append_arguments(self, width: int) -> AppendArguments:
        tensors = self.tensors
        shape = next(iter(tensors.cache.values())).shape
        row_bytes = shape[3] * next(iter(tensors.cache.values())).dtype.itemsize
        return AppendArguments(
            rows=tensors.row_pointers,
            buffers=tensors.buffer_pointers,
            write_index=tensors.named["write_index"].address,
            tokens=tensors.named["tokens"].address,
            sinks=tensors.named["sinks"].address,
            token_buffer=tensors.token_buffer.address,
            tensors=len(tensors.cache),
            groups=shape[1],
            capacity=shape[2],
            width=width,
            row_chunks=row_bytes // CHUNK_BYTES,
        )
