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

_RUNTIME = ("sampling", "step", "stream", "decoders", "session", "group", "load")
_HOMES = ("errors", "version", "schedule", *(f"runtime.{name}" for name in _RUNTIME))
"""Modules of names that are loaded when they are first asked for, each behind those that it imports."""

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
    for module in _HOMES if name in __all__ else ():
        if hasattr(home := import_module(f"diagd.{module}"), name):
            return getattr(home, name)
    raise AttributeError(f"module 'diagd' has no attribute '{name}'")
