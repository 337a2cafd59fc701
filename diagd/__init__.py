"""Real-time frames from autoregressive video world models by diagonal decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diagd.version import __version__

if TYPE_CHECKING:
    from diagd.runtime.load import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from diagd.runtime.load import load

        return load
    raise AttributeError(f"module 'diagd' has no attribute '{name}'")
