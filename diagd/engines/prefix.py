"""The ``prefix`` form on ONNX Runtime's CPU provider: cost follows the slots in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, Form
from diagd.engines.buffers import aligned_zeros, rotate_pairs, text_buffers
from diagd.engines.engine import VOID, Float, Int, SamplingState, StepInputs
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
        self._row_shape, self._dtype = shape[1:], dtype
        self._session = open_session(bundle.file(graph.file), bundle.digest, options)
        self._binding = self._session.io_binding()
        self._write_index = np.zeros(1, np.int64)
        self._logits = np.zeros((MAX_WIDTH, manifest.output_vocabulary), np.float32)
        self._bound = 0
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
        self._write_index[0] = inputs.write_index
        logits = self._logits[: len(inputs.decoded)]
        self._bind("sources", inputs.sources)
        self._bind("positions", inputs.positions)
        self._bind("logit_rows", inputs.decoded)
        self._bind_output("logits", logits)
        self._session.run_with_iobinding(self._binding)
        return logits

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
            self._bind(f"past_{name}", buffer[:length])
            self._bind_output(f"present_{name}", buffer[:length])
        self._bind("slot_position", self.slot_position[:length])
        self._bound = length

    def _bind(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    @property
    def outputs(self) -> list[onnxruntime.OrtValue]:
        """Values bound to the outputs of the last step, in the graph's order."""
        values: list[onnxruntime.OrtValue] = self._binding.get_outputs()
        return values
