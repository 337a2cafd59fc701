"""What the runtime asks of a backend that executes step graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int32]
Float = NDArray[np.float32]

VOID = np.iinfo(np.int32).max
"""Slot position of an empty or voided slot: no query ever sees it."""


@dataclass(frozen=True)
class SamplingState:
    """Numbers a graph with its own sampler reads; ``top_k`` 0 and ``top_p`` 1 switch a rule off."""

    temperature: float
    top_k: int
    top_p: float


@dataclass
class StepInputs:
    """One forward pass.

    Attributes:
        sources: int32 [W], places in the token buffer of the fed ids.
        positions: int32 [W], rotary positions.
        sinks: int32 [W], places in the token buffer that predictions fill; the last place for none.
        decoded: int32 [R], rows of the frontier whose prediction is wanted.
        uniforms: float32 [R], one random number for each of them.
        write_index: first slot written.
        live: slots in use once the step is written; none beyond is visible.
    """

    sources: Int
    positions: Int
    sinks: Int
    decoded: Int
    uniforms: Float
    write_index: int
    live: int


class Engine(Protocol):
    """One compiled backend over preallocated KV buffers.

    ``token_buffer`` and ``slot_position`` are the state that the runtime writes between steps.
    """

    capacity: int
    max_width: int
    samples_in_graph: bool
    slot_position: Int

    @property
    def token_buffer(self) -> Int:
        """Tokens by place, once every step so far has run; the runtime writes known ones into it."""
        ...

    def padded_width(self, width: int) -> int:
        """Slots that a step of ``width`` rows writes, pad rows included."""
        ...

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """Run one pass; K/V rows are written in place.

        Returns:
            Logits float32 [R, V] of ``inputs.decoded``, valid until the next step. An engine that samples in
            the graph has also written the sampled ids to the sinks.
        """
        ...

    def set_text(self, rows: Mapping[str, NDArray[np.generic]]) -> None:
        """Take the keys and values of a text, by input of the step graph; for models that read text."""
        ...

    def rotate_keys(self, angles: NDArray[np.float64], live: int) -> None:
        """Turn the keys of slots below ``live`` by ``angles`` (radians, one per channel pair)."""
        ...
