"""The ``portable`` form on ONNX Runtime's CPU provider."""

from __future__ import annotations

import numpy as np

from diagd.bundle import Form
from diagd.engines.buffers import aligned_zeros
from diagd.engines.fixed import Array, FixedEngine, FixedStep


class PortableStep(FixedStep):
    """The graph only reads the buffers; new rows and tokens are written once it has run."""

    def outputs(self) -> dict[str, Array]:
        """Tokens, logits and new rows."""
        width = len(self.uniforms)
        self._tokens = np.zeros(width, np.int32)
        self.new_rows = {
            name: aligned_zeros((*buffer.shape[:2], width, buffer.shape[3]), buffer.dtype)
            for name, buffer in self.engine.buffers.items()
        }
        new = {f"new_{name}": rows for name, rows in self.new_rows.items()}
        return {"tokens": self._tokens, "logits": self.logits, **new}

    def finish(self) -> None:
        """Append the rows to the buffers and put the tokens at their sinks."""
        start = int(self.write_index[0])
        for name, rows in self.new_rows.items():
            self.engine.buffers[name][:, :, start : start + rows.shape[2]] = rows
        self.engine.token_buffer[self.rows["sinks"]] = self._tokens


class PortableEngine(FixedEngine):
    """Split-score attention over buffers that the graph only reads; see ``FixedEngine``."""

    form = Form.PORTABLE
    step_type = PortableStep
