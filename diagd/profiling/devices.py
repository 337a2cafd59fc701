"""Devices by name: memory, bandwidth and arithmetic, as their makers state them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

GB: Final = 1e9
GIB: Final = 2**30


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: what users type.
        title: what it is called.
        memory: bytes.
        bandwidth: bytes a second.
        peak: dense matrix operations a second with half-precision inputs (single precision on a CPU).
        reserved: bytes that the system, the driver and the desktop keep.
        source: where the figures are from.
    """

    name: str
    title: str
    memory: float
    bandwidth: float
    peak: float
    reserved: float
    source: str

    @property
    def usable(self) -> float:
        """Bytes left to a model."""
        return self.memory - self.reserved


_JETSON: Final = 1.5 * GB  # one memory for everything; without a desktop
_CARD: Final = 0.5 * GB

_TABLE: Final[tuple[tuple[str, str, float, float, float, float], ...]] = (
    ("orin-nano", "Jetson Orin Nano Super 8 GB", 8 * GB, 102 * GB, 17e12, _JETSON),
    ("orin-agx", "Jetson AGX Orin 64 GB", 64 * GB, 204.8 * GB, 42.5e12, _JETSON),
    ("thor", "Jetson AGX Thor 128 GB", 128 * GB, 273 * GB, 258e12, _JETSON),
    ("rtx4090", "GeForce RTX 4090", 24 * GIB, 1008 * GB, 165.2e12, _CARD),
    ("rtx5090", "GeForce RTX 5090", 32 * GIB, 1792 * GB, 209.5e12, _CARD),
    ("a100-80", "A100 80 GB SXM", 80 * GB, 2039 * GB, 312e12, _CARD),
    ("h200", "H200 141 GB SXM", 141 * GB, 4800 * GB, 989e12, _CARD),
)
_SOURCES: Final = {
    "orin-nano": "Jetson Orin Nano Super Developer Kit data sheet",
    "orin-agx": "Jetson AGX Orin Series technical brief v1.2: GPU part, dense, half of INT8",
    "thor": "Jetson Thor data sheet: an eighth of 2070 sparse FP4 TFLOPS",
    "rtx4090": "Ada GPU architecture whitepaper, FP32 accumulation",
    "rtx5090": "RTX Blackwell GPU architecture whitepaper, FP32 accumulation",
    "a100-80": "A100 Tensor Core GPU data sheet",
    "h200": "H200 Tensor Core GPU data sheet",
}
DEVICES: Final = {row[0]: Device(*row, f"NVIDIA {_SOURCES[row[0]]}") for row in _TABLE}
"""Devices of the table; ``this`` is measured where it is asked for."""

THIS: Final = "this"
