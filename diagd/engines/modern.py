"""The ``modern`` form on ONNX Runtime's CPU provider."""

from __future__ import annotations

from diagd.bundle import Form
from diagd.engines.fixed import Array, FixedEngine, FixedStep


class ModernStep(FixedStep):
    """The graph writes buffers and tokens in place, for its outputs are bound to the memory of its inputs."""

    def outputs(self) -> dict[str, Array]:
        """The token buffer, the logits and the K/V buffers themselves."""
        present = {f"present_{name}": buffer for name, buffer in self.engine.buffers.items()}
        return {"next_token_buffer": self.engine.token_buffer, "logits": self.logits, **present}

    def finish(self) -> None:
        """Nothing is left to do."""


class ModernEngine(FixedEngine):
    """TensorScatter and Attention over buffers that are updated in place; see ``FixedEngine``."""

    form = Form.MODERN
    step_type = ModernStep
