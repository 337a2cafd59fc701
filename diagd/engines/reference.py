"""The ``prefix`` form run plainly, to compare other engines with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, Form
from diagd.engines.engine import Float, Steps
from diagd.engines.prefix import PrefixState
from diagd.errors import BundleError, require


class ReferenceEngine(PrefixState):
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
        session = runtime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        super().__init__(manifest, capacity, tokens, max_width)
        self._session = session
        self._logits: Float = np.zeros((0, manifest.output_vocabulary), np.float32)

    def send(self, steps: Steps) -> None:
        """Take the steps to run next; see ``Engine.send``."""
        self._steps, self._next = steps, 0

    def step(self) -> None:
        """Run one pass; see ``Engine.step``."""
        steps, n = self._steps, self._next
        self._next += 1
        rows = slice(steps.offsets[n], steps.offsets[n + 1])
        changed = slice(steps.update_offsets[n], steps.update_offsets[n + 1])
        self.slot_position[steps.update_slots[changed]] = steps.update_positions[changed]
        feeds: dict[str, NDArray[Any]] = {
            "token_buffer": self.token_buffer,
            "sources": steps.sources[rows],
            "positions": steps.positions[rows],
            "slot_position": self.slot_position,
            "write_index": steps.write_index[n : n + 1].astype(np.int64),
            "logit_rows": steps.decoded[steps.decode_offsets[n] : steps.decode_offsets[n + 1]],
            **{f"past_{name}": buffer for name, buffer in self.buffers.items()},
            **self._text,
        }
        outputs = self.evaluate(feeds, ["logits", *(f"present_{name}" for name in self.buffers)])
        self._logits = outputs.pop("logits")
        self.buffers = dict(zip(self.buffers, outputs.values(), strict=True))

    def draw(self) -> None:
        """Draw tokens from the logits; see ``Engine.draw``."""
        places, ids = self._sampler.draw(self._logits, self._steps, self._next - 1)
        self.token_buffer[places] = ids

    def logits(self) -> Float:
        """Of the last step; see ``Engine.logits``."""
        return self._logits

    def watched(self) -> Mapping[str, NDArray[Any]]:
        """Nothing."""
        return {}
