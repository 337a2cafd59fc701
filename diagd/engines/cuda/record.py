"""Step records: all that a device must know of one step, in one short copy."""

from __future__ import annotations

import numpy as np

from diagd.engines.cuda.device import Array, Device
from diagd.engines.cuda.kernels import HEADER_WORDS
from diagd.engines.engine import Int, SamplingState, StepInputs

RECORDS = 64
"""Steps that the host may be ahead of the device."""


class RecordRing:
    """Rows of 32-bit words on the host and the same on the device; ``native/step_kernels.h`` has the layout.

    Args:
        device: where the records go.
        max_width: widest step.
        max_updates: slots whose position a step may change.
        scratch: place of the token buffer for rows without a sink.
    """

    def __init__(self, device: Device, max_width: int, max_updates: int, scratch: int) -> None:
        self._device, self._scratch = device, scratch
        self.max_width, self.max_updates = max_width, max_updates
        words = HEADER_WORDS + 4 * max_width + 2 * max_updates
        self._host: Array = device.host_array((RECORDS, words), np.int32)
        self.address = device.allocate(self._host.nbytes)
        self._next = 0

    def send(self, inputs: StepInputs, sampling: SamplingState, changed: Int, positions: Int) -> None:
        """Queue the next step's record.

        Args:
            inputs: the step.
            sampling: the sampler's numbers.
            changed: int32 [n], slots whose position differs from what the device has, n <= max_updates.
            positions: int32 [n], their positions.
        """
        record = self._host[self._next]
        rows, width = len(inputs.positions), self.max_width
        real = np.array([sampling.temperature, sampling.top_p, 0.5], np.float32).view(np.int32)
        record[:7] = (
            rows, inputs.write_index, inputs.live, len(changed), real[0], sampling.top_k, real[1]
        )  # fmt: skip
        sources, row_positions, sinks, uniforms = record[HEADER_WORDS : HEADER_WORDS + 4 * width].reshape(
            4, -1
        )
        sources[:rows], row_positions[:rows] = inputs.sources, inputs.positions
        sinks[:rows], uniforms[:rows] = self._scratch, real[2]
        sinks[inputs.decoded] = inputs.sinks[inputs.decoded]
        uniforms[inputs.decoded] = inputs.uniforms.view(np.int32)
        used = HEADER_WORDS + 4 * width + 2 * len(changed)
        updates = record[HEADER_WORDS + 4 * width : used].reshape(-1, 2)
        updates[:, 0], updates[:, 1] = changed, positions
        stride = self._host.strides[0]
        self._device.upload(self.address + self._next * stride, record[:used])
        self._next = (self._next + 1) % RECORDS

    def restart(self) -> None:
        """Begin at the first record again, as a device counter of 0 does."""
        self._next = 0
