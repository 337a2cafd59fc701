"""The ``prefix`` form run plainly, to compare other engines with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, Form
from diagd.engines.buffers import cache_tensors, rotate_pairs, text_buffers
from diagd.engines.engine import VOID, Clock, Float, HostClock, Int, Steps
from diagd.engines.sampler import HostSampler
from diagd.errors import BundleError, require


class ReferenceEngine:
    """FP32 on ONNX Runtime's CPU provider with everything off that could go wrong.

    No graph optimisation, no packed weights, no cache in place, no live prefix, one thread: arrays in, arrays
    out, the whole capacity every time.

    Args:
        bundle: with an FP32 graph in the prefix form.
        capacity: slots.
        tokens: size of the token buffer.
        max_width: widest pass; that of another engine where both are to run the same steps.

    Raises:
        BundleError: the bundle has no such graph.
    """

    form = Form.PREFIX
    ahead = False

    def __init__(self, bundle: Bundle, capacity: int, tokens: int, max_width: int) -> None:
        manifest = bundle.manifest
        graph = next((g for g in manifest.graphs if g.form is Form.PREFIX and g.precision == "fp32"), None)
        if graph is None:
            raise BundleError(
                f"{bundle.path} has no FP32 graph in the prefix form to compare with; export the same "
                "weights with --form prefix and give that bundle as --reference"
            )
        runtime = require("onnxruntime", extra="export", purpose="run the reference")
        settings = runtime.SessionOptions()
        settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.intra_op_num_threads, settings.log_severity_level = 1, 3
        path = str(bundle.file(graph.file))
        self._session = runtime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self.capacity, self.max_width = capacity, max_width
        self.clock: Clock = HostClock()
        self._sampler = HostSampler(manifest)
        self._tokens: Int = np.zeros(tokens, np.int32)
        self._slots: Int = np.full(capacity, VOID, np.int32)
        shape = (capacity, manifest.cache.kv_heads, manifest.cache.head_size)
        self._cache = {name: np.zeros(shape, manifest.cache.dtype) for name in cache_tensors(manifest.cache)}
        self._text: dict[str, NDArray[Any]] = dict(text_buffers(manifest))
        self._logits: Float = np.zeros((0, manifest.output_vocabulary), np.float32)

    def padded_widths(self, widths: Int) -> Int:
        """No pad rows."""
        return widths

    def send(self, steps: Steps) -> None:
        """Take the steps to run next; see ``Engine.send``."""
        self._steps, self._next = steps, 0

    def step(self) -> None:
        """Run one pass; see ``Engine.step``."""
        steps, n = self._steps, self._next
        self._next += 1
        rows = slice(steps.offsets[n], steps.offsets[n + 1])
        changed = slice(steps.update_offsets[n], steps.update_offsets[n + 1])
        self._slots[steps.update_slots[changed]] = steps.update_positions[changed]
        feeds: dict[str, NDArray[Any]] = {
            "token_buffer": self._tokens,
            "sources": steps.sources[rows],
            "positions": steps.positions[rows],
            "slot_position": self._slots,
            "write_index": steps.write_index[n : n + 1].astype(np.int64),
            "logit_rows": steps.decoded[steps.decode_offsets[n] : steps.decode_offsets[n + 1]],
            **{f"past_{name}": buffer for name, buffer in self._cache.items()},
            **self._text,
        }
        outputs = self.evaluate(feeds, ["logits", *(f"present_{name}" for name in self._cache)])
        self._logits = outputs.pop("logits")
        self._cache = dict(zip(self._cache, outputs.values(), strict=True))

    def draw(self) -> None:
        """Draw tokens from the logits; see ``Engine.draw``."""
        places, ids = self._sampler.draw(self._logits, self._steps, self._next - 1)
        self._tokens[places] = ids

    def logits(self) -> Float:
        """Of the last step; see ``Engine.logits``."""
        return self._logits

    def watched(self) -> Mapping[str, NDArray[Any]]:
        """Nothing."""
        return {}

    def write_tokens(self, places: Int, ids: Int) -> None:
        """Put ids into the token buffer."""
        self._tokens[places] = ids

    def read_tokens(self, places: Int) -> Int:
        """Ids in the token buffer."""
        return self._tokens[places]

    def write_slots(self, slot_position: Int) -> None:
        """Take the position of every slot."""
        self._slots[:] = slot_position

    def set_text(self, rows: Mapping[str, NDArray[Any]]) -> None:
        """Take a text; see ``Engine.set_text``."""
        self._text = {name: np.asarray(rows[name]) for name in self._text}

    def rotate_keys(self, angles: NDArray[np.float64], live: int) -> None:
        """Turn cached keys; see ``Engine.rotate_keys``."""
        for name, buffer in self._cache.items():
            if name.startswith("key"):
                rotate_pairs(buffer[:live], angles)

    def evaluate(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run the graph on given inputs; see ``Engine.evaluate``."""
        return dict(zip(outputs, self._session.run(list(outputs), dict(feeds)), strict=True))

    def memory_used(self) -> int:
        """None of a device."""
        return 0

    def close(self) -> None:
        """Give the memory back."""
        self._session = None
        self._cache.clear()
