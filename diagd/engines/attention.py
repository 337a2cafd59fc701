"""Attention of a step on a GPU by ``native/attention.cu``, in place of ONNX Runtime's own.

The provider gives a block to each head and 64 rows. A step has few of either and thousands of slots: most of
a GPU stood idle, and an H200 spent 80 to 90 % of a step there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, SupportsInt

import numpy as np

from diagd.bundle import Manifest
from diagd.bundle.manifest import StepGraph
from diagd.engines.devices.kernels import ATTEND, ATTENTION, COMBINE, compile_attention, host_build
from diagd.errors import DependencyError

HEAD_SIZES: Final = (32, 64, 96, 128)
"""Others would leave parts of a matrix instruction empty, or not fit the registers."""

LEAST_ARCHITECTURE: Final = 80
"""Compute capability with asynchronous copies and the instruction that is used."""


class Loader(Protocol):
    """What takes kernels: an NVIDIA GPU."""

    @property
    def architecture(self) -> int:
        """Compute capability, such as 90."""
        ...

    @property
    def processors(self) -> int:
        """Streaming multiprocessors."""
        ...

    def allocate(self, size: int) -> int:
        """Address of so many bytes."""
        ...

    def load(self, code: bytes, names: Sequence[str], shared: int = 0) -> Mapping[str, SupportsInt]:
        """Handles of functions by name."""
        ...


def attention_operators(manifest: Manifest, graph: StepGraph, device: Loader) -> Path | None:
    """The library that the next session registers, so that its attention runs on the kernel; None: it cannot.

    It cannot where the cache is not float16, heads have another size, the GPU is older, or nothing was or can
    be compiled.
    """
    library, size = host_build(), manifest.cache.head_size
    suits = manifest.cache_dtype(graph) == np.float16 and size in HEAD_SIZES
    if library is None or not suits or device.architecture < LEAST_ARCHITECTURE:
        return None
    try:
        code = compile_attention(device.architecture, size)
    except DependencyError:  # where the other kernels were compiled ahead, NVRTC may be missing
        return None
    floats = library.diagd_attend_floats
    floats.restype = ctypes.c_int64
    functions = device.load(code, ATTENTION, library.diagd_attend_shared(size))
    count = floats(device.processors, size)
    library.diagd_attend_with(
        ctypes.c_void_p(int(functions[ATTEND])),
        ctypes.c_void_p(int(functions[COMBINE])),
        ctypes.c_void_p(device.allocate(4 * count)),
        ctypes.c_int64(count),
        device.processors,
        size,
    )
    return Path(library._name)
