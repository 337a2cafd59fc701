"""The ``modern`` form on ONNX Runtime: fixed widths over one set of buffers, sampling in the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import StepGraph
from diagd.engines.buffers import aligned_zeros, rotate_pairs
from diagd.engines.engine import VOID, Float, Int, SamplingState, StepInputs
from diagd.engines.onnxruntime_session import CpuOptions, open_session
from diagd.errors import BundleError


class ModernEngine:
    """Head-major K/V buffers [1, G, S, D], bound once to every width's session as input and output.

    A step runs in the narrowest width that holds it; pad rows go last, are never visible and are overwritten
    by the next step.
    """

    samples_in_graph = True

    def __init__(self, bundle: Bundle, tokens: int, options: CpuOptions) -> None:
        manifest = bundle.manifest
        graphs = [graph for graph in manifest.graphs if graph.form is Form.MODERN]
        if not graphs:
            raise BundleError(f"{bundle.path} has no modern graphs; export it with --form modern")
        self.capacity = int(graphs[0].capacity or 0)
        self.max_width = max(int(graph.width or 0) for graph in graphs)
        self.token_buffer: Int = np.zeros(tokens, np.int32)
        self.slot_position: Int = np.full(self.capacity, VOID, np.int32)
        cache = manifest.cache
        shape = (1, cache.kv_heads, self.capacity, cache.head_size)
        names = [f"{kind}_{layer}" for layer in range(cache.layers) for kind in ("key", "value")]
        self.buffers = {name: aligned_zeros(shape, np.dtype(cache.dtype)) for name in names}
        self._steps = {
            int(graph.width or 0): _Width(self, bundle, graph, options)
            for graph in sorted(graphs, key=lambda graph: graph.width or 0)
        }

    def padded_width(self, width: int) -> int:
        """The narrowest compiled width that holds ``width`` rows."""
        return next(compiled for compiled in self._steps if compiled >= width)

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """Run one pass; see ``Engine.step``."""
        return self._steps[self.padded_width(len(inputs.positions))].run(inputs, sampling)

    def rotate_keys(self, angles: NDArray[np.float64], live: int) -> None:
        """Turn cached keys; see ``Engine.rotate_keys``."""
        for name, buffer in self.buffers.items():
            if name.startswith("key"):
                rotate_pairs(buffer[:, :, :live], angles)


class _Width:
    """One compiled width: its session and the fixed tensors it reads."""

    def __init__(self, engine: ModernEngine, bundle: Bundle, graph: StepGraph, options: CpuOptions) -> None:
        width = int(graph.width or 0)
        self._scratch = len(engine.token_buffer) - 1
        self._rows = {name: np.zeros(width, np.int32) for name in ("sources", "positions", "sinks")}
        self._uniforms = np.zeros(width, np.float32)
        self._write_index = np.zeros(1, np.int64)
        self._temperature, self._top_p = np.zeros((), np.float32), np.zeros((), np.float32)
        self._top_k = np.zeros((), np.int32)
        self._logits = np.zeros((width, bundle.manifest.output_vocabulary), np.float32)
        self._session = open_session(bundle.file(graph.file), bundle.digest, options)
        self._binding = self._session.io_binding()
        inputs: dict[str, NDArray[Any]] = {
            "token_buffer": engine.token_buffer,
            **self._rows,
            "slot_position": engine.slot_position,
            "write_index": self._write_index,
            "uniforms": self._uniforms,
            "temperature": self._temperature,
            "top_k": self._top_k,
            "top_p": self._top_p,
        }
        outputs: dict[str, NDArray[Any]] = {
            "next_token_buffer": engine.token_buffer,
            "logits": self._logits,
        }
        inputs |= {f"past_{name}": buffer for name, buffer in engine.buffers.items()}
        outputs |= {f"present_{name}": buffer for name, buffer in engine.buffers.items()}
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        width = len(inputs.positions)
        for name in ("sources", "positions"):
            self._rows[name][:width] = getattr(inputs, name)
            self._rows[name][width:] = 0
        self._rows["sinks"][:] = self._scratch
        self._rows["sinks"][inputs.decoded] = inputs.sinks[inputs.decoded]
        self._uniforms[:] = 0.5
        self._uniforms[inputs.decoded] = inputs.uniforms
        self._write_index[0] = inputs.write_index
        self._temperature[...] = sampling.temperature
        self._top_k[...], self._top_p[...] = sampling.top_k, sampling.top_p
        self._session.run_with_iobinding(self._binding)
        return self._logits[inputs.decoded]
