"""What the forms of fixed capacity share on ONNX Runtime's CPU provider."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import CacheShape, StepGraph
from diagd.engines.buffers import aligned_zeros, rotate_pairs, text_buffers
from diagd.engines.engine import VOID, Float, Int, SamplingState, StepInputs
from diagd.engines.fingerprint import graph_digest
from diagd.engines.onnxruntime_session import CpuOptions, open_session
from diagd.errors import BundleError

Array = NDArray[Any]


class FixedEngine:
    """Head-major K/V buffers [1, G, S, D] under one session that runs at a few widths.

    A step runs in the narrowest width that holds it; pad rows go last, are never visible and are overwritten
    by the next step.
    """

    samples_in_graph = True
    form: ClassVar[Form]
    step_type: ClassVar[type[FixedStep]]

    def __init__(self, bundle: Bundle, tokens: int, options: CpuOptions) -> None:
        """``tokens`` is the size of the token buffer."""
        graphs = graphs_of(bundle, self.form)
        manifest = bundle.manifest
        self.capacity = int(graphs[0].capacity or 0)
        self.widths = tuple(int(graph.width or 0) for graph in graphs)
        self.max_width = self.widths[-1]
        self.token_buffer: Int = np.zeros(tokens, np.int32)
        self.slot_position: Int = np.full(self.capacity, VOID, np.int32)
        shape = (1, manifest.cache.kv_heads, self.capacity, manifest.cache.head_size)
        dtype = manifest.cache_dtype(graphs[0])
        self.buffers = {name: aligned_zeros(shape, dtype) for name in cache_tensors(manifest.cache)}
        self.text = text_buffers(manifest)
        options = options.suiting(graphs[0].precision)
        digest = graph_digest(bundle, graphs[0])
        self._session = open_session(bundle.file(graphs[0].file), digest, options)
        vocabulary = manifest.output_vocabulary
        self._steps = {width: self.step_type(self._session, self, width, vocabulary) for width in self.widths}

    def padded_width(self, width: int) -> int:
        """The narrowest width that holds ``width`` rows."""
        return next(padded for padded in self.widths if padded >= width)

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """Run one pass; see ``Engine.step``."""
        return self._steps[self.padded_width(len(inputs.positions))].run(inputs, sampling)

    def set_text(self, rows: Mapping[str, Array]) -> None:
        """Take a text; see ``Engine.set_text``."""
        for name, buffer in self.text.items():
            buffer[:] = rows[name]

    def rotate_keys(self, angles: NDArray[np.float64], live: int) -> None:
        """Turn cached keys; see ``Engine.rotate_keys``."""
        for name, buffer in self.buffers.items():
            if name.startswith("key"):
                rotate_pairs(buffer[:, :, :live], angles)


def graphs_of(bundle: Bundle, form: Form) -> list[StepGraph]:
    """The bundle's graphs of a form, narrowest first.

    Raises:
        BundleError: it has none.
    """
    graphs = [graph for graph in bundle.manifest.graphs if graph.form is form]
    if not graphs:
        raise BundleError(
            f"{bundle.path} has no {form.value} graph; export it again with --form {form.value}"
        )
    return sorted(graphs, key=lambda graph: graph.width or 0)


def cache_tensors(cache: CacheShape) -> list[str]:
    """Names of the K/V buffers in graph order: key_0, value_0, key_1, ..."""
    return [f"{kind}_{layer}" for layer in range(cache.layers) for kind in ("key", "value")]


class FixedStep(ABC):
    """One width: the tensors it reads and what they are bound to."""

    def __init__(self, session: Any, engine: FixedEngine, width: int, vocabulary: int) -> None:
        self.engine = engine
        self.scratch = len(engine.token_buffer) - 1
        self.rows = {name: np.zeros(width, np.int32) for name in ("sources", "positions", "sinks")}
        self.uniforms = np.zeros(width, np.float32)
        self.write_index = np.zeros(1, np.int64)
        self.temperature, self.top_p = np.zeros((), np.float32), np.zeros((), np.float32)
        self.top_k = np.zeros((), np.int32)
        self.logits = np.zeros((width, vocabulary), np.float32)
        self._session, self._binding = session, session.io_binding()
        wanted = {value.name for value in session.get_inputs()}
        for name, array in self._inputs().items():
            if name in wanted:
                self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in self.outputs().items():
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _inputs(self) -> dict[str, Array]:
        past = {f"past_{name}": buffer for name, buffer in self.engine.buffers.items()}
        return {
            "token_buffer": self.engine.token_buffer,
            **self.rows,
            "slot_position": self.engine.slot_position,
            "write_index": self.write_index,
            "uniforms": self.uniforms,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            **past,
            **self.engine.text,
        }

    @abstractmethod
    def outputs(self) -> dict[str, Array]:
        """Arrays that the graph's outputs are bound to, by name."""

    @abstractmethod
    def finish(self) -> None:
        """Do what is left once the graph has run."""

    def run(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """Run one pass; see ``Engine.step``."""
        width = len(inputs.positions)
        self.rows["sources"][:width] = inputs.sources
        self.rows["positions"][:width] = inputs.positions
        # A pad row stands where the last row stands: a query that sees nothing would be NaN on some backends,
        # and a NaN among the cached values spreads even from a hidden slot.
        self.rows["positions"][width:] = inputs.positions[-1]
        self.rows["sinks"][:] = self.scratch
        self.rows["sinks"][inputs.decoded] = inputs.sinks[inputs.decoded]
        self.uniforms[:] = 0.5
        self.uniforms[inputs.decoded] = inputs.uniforms
        self.write_index[0] = inputs.write_index
        self.temperature[...] = sampling.temperature
        self.top_k[...], self.top_p[...] = sampling.top_k, sampling.top_p
        self._session.run_with_iobinding(self._binding)
        self.finish()
        return self.logits[inputs.decoded]
