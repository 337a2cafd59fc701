"""The ``prefix`` form on ONNX Runtime's CPU provider: cost follows the slots in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, Form
from diagd.engines.buffers import aligned_zeros, rotate_pairs, text_buffers
from diagd.engines.engine import VOID, Float, Int, SamplingState, StepInputs
from diagd.engines.fingerprint import graph_digest
from diagd.engines.onnxruntime_session import CpuOptions, open_session

if TYPE_CHECKING:
    import onnxruntime

GRANULE = 32
"""Slots by which the bound prefix grows: most steps then bind the same K/V shapes as the step before."""

MAX_WIDTH = 256
"""Widest pass; the prompt is fed in chunks of it, which bounds the scores' memory."""


class PrefixEngine:
    """Sequence-major K/V buffers [S, G, D], of which each step binds the live prefix as input and output.

    The graph scatters a step's rows into the bound input; because the output is bound to the same memory,
    ONNX Runtime writes in place and copies nothing.
    """

    samples_in_graph = False
    max_width = MAX_WIDTH

    def __init__(self, bundle: Bundle, capacity: int, tokens: int, options: CpuOptions) -> None:
        manifest = bundle.manifest
        graph = manifest.graph(Form.PREFIX)
        self.capacity = -(-capacity // GRANULE) * GRANULE
        self.token_buffer: Int = np.zeros(tokens, np.int32)
        self.slot_position: Int = np.full(self.capacity, VOID, np.int32)
        shape = (self.capacity, manifest.cache.kv_heads, manifest.cache.head_size)
        dtype = np.dtype(manifest.cache.dtype)
        names = [f"{kind}_{layer}" for layer in range(manifest.cache.layers) for kind in ("key", "value")]
        self.buffers = {name: aligned_zeros(shape, dtype) for name in names}
        self._text = text_buffers(manifest)
        digest, options = graph_digest(bundle, graph), options.suiting(graph.precision)
        self._session = open_session(bundle.file(graph.file), digest, options)
        self._binding = self._session.io_binding()
        self._write_index = np.zeros(1, np.int64)
        self._logits = np.zeros((MAX_WIDTH, manifest.output_vocabulary), np.float32)
        self._fed = {name: np.zeros(MAX_WIDTH, np.int32) for name in ("sources", "positions", "logit_rows")}
        self._addresses: dict[int, int] = {}
        self._bound = self._bound_width = self._bound_rows = -1  # nothing yet, not even an empty step
        self._bind("token_buffer", self.token_buffer)
        self._bind("write_index", self._write_index)
        self._bind_output("logits", self._logits)
        for name, buffer in self._text.items():
            self._bind(name, buffer)

    def padded_width(self, width: int) -> int:
        """Widths are dynamic: no pad rows."""
        return width

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """Run one pass; see ``Engine.step``."""
        del sampling
        self._bind_prefix(-(-inputs.live // GRANULE) * GRANULE)
        width, rows = len(inputs.sources), len(inputs.decoded)
        self._bind_frontier(width, rows)
        self._write_index[0] = inputs.write_index
        self._fed["sources"][:width] = inputs.sources
        self._fed["positions"][:width] = inputs.positions
        self._fed["logit_rows"][:rows] = inputs.decoded
        self._session.run_with_iobinding(self._binding)
        return self._logits[:rows]

    def set_text(self, rows: Mapping[str, NDArray[np.generic]]) -> None:
        """Take a text; see ``Engine.set_text``."""
        for name, buffer in self._text.items():
            buffer[:] = rows[name]

    def rotate_keys(self, angles: NDArray[np.float64], live: int) -> None:
        """Turn cached keys; see ``Engine.rotate_keys``."""
        for name, buffer in self.buffers.items():
            if name.startswith("key"):
                rotate_pairs(buffer[:live], angles)

    def _bind_prefix(self, length: int) -> None:
        if length == self._bound:
            return
        for name, buffer in self.buffers.items():
            self._bind_rows(f"past_{name}", buffer, length)
            self._bind_rows(f"present_{name}", buffer, length, output=True)
        self._bind_rows("slot_position", self.slot_position, length)
        self._bound = length

    def _bind_frontier(self, width: int, rows: int) -> None:
        if width != self._bound_width:
            self._bind_rows("sources", self._fed["sources"], width)
            self._bind_rows("positions", self._fed["positions"], width)
        if rows != self._bound_rows:
            self._bind_rows("logit_rows", self._fed["logit_rows"], rows)
            self._bind_rows("logits", self._logits, rows, output=True)
        self._bound_width, self._bound_rows = width, rows

    def _bind_rows(self, name: str, buffer: NDArray[Any], rows: int, *, output: bool = False) -> None:
        """Bind the first rows of a buffer that lives as long as the engine; its address is looked up once."""
        if (address := self._addresses.get(id(buffer))) is None:
            address = self._addresses[id(buffer)] = buffer.ctypes.data
        bind = self._binding.bind_output if output else self._binding.bind_input
        bind(name, "cpu", 0, buffer.dtype, (rows, *buffer.shape[1:]), address)

    def _bind(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    @property
    def outputs(self) -> list[onnxruntime.OrtValue]:
        """Values bound to the outputs of the last step, in the graph's order."""
        values: list[onnxruntime.OrtValue] = self._binding.get_outputs()
        return values
