"""Real-time frames from autoregressive video world models by diagonal decoding.

``load`` opens a bundle as a ``Session``; a session decodes a ``Stream`` frame by frame or step by step, by a
``Decoder`` such as ``ScheduledDecoder(Schedule.chained(session.layout, k=1))``.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diagd.errors import DiagdError
    from diagd.runtime.decoders import Decoder, DraftDecoder, ForcedDecoder, JacobiDecoder, ScheduledDecoder
    from diagd.runtime.group import Group
    from diagd.runtime.load import load
    from diagd.runtime.sampling import SamplingSettings
    from diagd.runtime.session import Session
    from diagd.runtime.step import Frame, Result
    from diagd.runtime.stream import Stream
    from diagd.schedule import Block, RowSeed, Schedule, Step
    from diagd.version import __version__

# ONNX Runtime tells its maker of every session, and keeps an id of the machine, unless this says otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "diagd.errors": ("DiagdError",),
    "diagd.runtime.decoders": (
        *("Decoder", "DraftDecoder", "ForcedDecoder", "JacobiDecoder", "ScheduledDecoder"),
    ),
    "diagd.runtime.group": ("Group",),
    "diagd.runtime.load": ("load",),
    "diagd.runtime.sampling": ("SamplingSettings",),
    "diagd.runtime.session": ("Session",),
    "diagd.runtime.step": ("Frame", "Result"),
    "diagd.runtime.stream": ("Stream",),
    "diagd.schedule": ("Block", "RowSeed", "Schedule", "Step"),
    "diagd.version": ("__version__",),
}
"""Where names are that are loaded when they are first asked for."""

__all__ = [
    "Block",
    "Decoder",
    "DiagdError",
    "DraftDecoder",
    "ForcedDecoder",
    "Frame",
    "Group",
    "JacobiDecoder",
    "Result",
    "RowSeed",
    "SamplingSettings",
    "Schedule",
    "ScheduledDecoder",
    "Session",
    "Step",
    "Stream",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'diagd' has no attribute '{name}'")
