"""The ``prefix`` form run plainly, to compare other engines with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from typing_extensions import override

from diagd.bundle import Bundle, Form
from diagd.engines.engine import Float
from diagd.engines.prefix import PlainPrefix
from diagd.errors import BundleError, require


class ReferenceEngine(PlainPrefix):
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

    @override
    def forward(self, feeds: Mapping[str, NDArray[Any]], live: int) -> Float:
        """The whole capacity, into new buffers."""
        del live
        past = {f"past_{name}": buffer[:, None] for name, buffer in self.buffers.items()}
        outputs = self.evaluate({**feeds, **past}, ["logits", *(f"present_{name}" for name in self.buffers)])
        logits = outputs.pop("logits")
        self.buffers = {name: rows[:, 0] for name, rows in zip(self.buffers, outputs.values(), strict=True)}
        return logits
