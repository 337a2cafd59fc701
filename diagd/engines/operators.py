"""What stands between a step's products on a GPU, by kernels of ``native/`` in place of ONNX Runtime's own.

The provider has 19 launches between the products of a layer, these are four, one between two products
(``layer.cu``). Its attention has a block to each head and 64 rows: a step has few of either and thousands of
slots, so that most of a GPU stood idle, and an H200 spent 80 to 90 % of a step there (``attention.cu``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, SupportsInt

import numpy as np

from diagd.bundle import Manifest
from diagd.bundle.manifest import StepGraph
from diagd.engines.devices.kernels import (
    ATTENTION,
    LAYER,
    OperatorArguments,
    compile_attention,
    compile_layer,
    host_build,
)
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

    @property
    def block_bytes(self) -> int:
        """Memory that a block may ask for."""
        ...

    def allocate(self, size: int) -> int:
        """Address of so many bytes, which its stream zeroes."""
        ...

    def load(self, code: bytes, names: Sequence[str], shared: int = 0) -> Mapping[str, SupportsInt]:
        """Handles of functions by name."""
        ...


VECTOR: Final = 8
"""Elements that a thread reads at a time: rows are whole numbers of them."""

KEPT_BYTES: Final = 1024
"""Of a block's memory, for what a kernel has there by itself and what the driver keeps."""

MOST_HIDDEN: Final = 8192
"""A block has a row, and a thread eight elements of it."""


def step_operators(manifest: Manifest, graph: StepGraph, device: Loader) -> Path | None:
    """The library that the next session registers, to run functions of a step on kernels; None: it cannot.

    It cannot where the cache is not float16, heads or rows have another size, the GPU is older, or nothing
    was or can be compiled: ONNX Runtime then puts the operators of a function in its place.
    """
    library, size = host_build(), manifest.transformer.head_size
    if library is None or not suits(manifest, graph) or device.architecture < LEAST_ARCHITECTURE:
        return None
    try:
        code = compile_attention(device.architecture, size), compile_layer(device.architecture)
    except DependencyError:  # where the other kernels were compiled ahead, NVRTC may be missing
        return None
    block_bytes = device.block_bytes - KEPT_BYTES
    functions = device.load(code[0], ATTENTION, library.diagd_attend_shared(size, block_bytes))
    functions = {**device.load(code[1], LAYER), **functions}
    arguments = OperatorArguments()
    arguments.functions[:] = [int(functions[name]) for name in (*LAYER, *ATTENTION)]
    library.diagd_attend_bytes.restype = ctypes.c_int64
    arguments.between = device.allocate(library.diagd_attend_bytes(device.processors, size))
    arguments.processors, arguments.block_bytes, arguments.size = device.processors, block_bytes, size
    library.diagd_operators_with(ctypes.byref(arguments))
    return Path(library._name)


def suits(manifest: Manifest, graph: StepGraph) -> bool:
    """Whether kernels take a graph's types and sizes."""
    config = manifest.transformer
    return (
        manifest.cache_dtype(graph) == np.float16
        and config.head_size in HEAD_SIZES
        and config.hidden % VECTOR == config.feed_forward % VECTOR == 0
        and config.hidden <= MOST_HIDDEN
    )
