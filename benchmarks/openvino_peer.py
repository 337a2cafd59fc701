"""The step graphs of a bundle in OpenVINO: same files, same cache contents, same steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
from numpy.typing import NDArray

from diagd.engines.engine import Float, Steps
from diagd.engines.prefix import GRANULE, PrefixEngine


class OpenVinoPeer:
    """A ``prefix`` graph on OpenVINO's CPU plugin, one thread, over a copy of an engine's cache.

    Floating point stays float32: OpenVINO's own choice on this processor, bfloat16, moves the logits by a
    quarter of their norm. Like the engine it binds the live prefix as input and as output.
    """

    def __init__(self, graph: Path, engine: PrefixEngine) -> None:
        settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        self._request = openvino.Core().compile_model(str(graph), "CPU", settings).create_infer_request()
        self._token_buffer = engine.token_buffer
        self._slot_position = engine.slot_position
        self._buffers = {name: buffer.copy() for name, buffer in engine.buffers.items()}

    def send(self, steps: Steps) -> None:
        """Take the one pass to run next; the engine's slots have its positions already."""
        self._steps = steps

    def step(self) -> None:
        """One pass; see ``diagd.engines.engine.Engine.step``."""
        steps = self._steps
        length = -(-int(steps.live[0]) // GRANULE) * GRANULE
        self._bind("token_buffer", self._token_buffer)
        self._bind("slot_position", self._slot_position[:length])
        self._bind("sources", steps.sources)
        self._bind("positions", steps.positions)
        self._bind("logit_rows", steps.decoded)
        self._bind("write_index", steps.write_index.astype(np.int64))
        for name, buffer in self._buffers.items():
            self._bind(f"past_{name}", buffer[:length])
            self._bind(f"present_{name}", buffer[:length])
        self._request.infer()

    def logits(self) -> Float:
        """Of the last step; see ``diagd.engines.engine.Engine.logits``."""
        logits: Float = self._request.get_tensor("logits").data
        return logits

    def _bind(self, name: str, array: NDArray[np.generic]) -> None:
        self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
