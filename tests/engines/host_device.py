"""A device over the host's memory with the host build of the kernels; it records what is queued."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from diagd.bundle import Bundle, Form
from diagd.engines.backend import StepOptions, graphs_of, widths_of
from diagd.engines.devices import Array, host
from diagd.engines.executor import Executor
from diagd.engines.onnxruntime_session import OnnxRuntimeProgram
from diagd.engines.tensors import Tensor
from tests.models import made_once

ROOT = Path(__file__).parents[2]


@lru_cache
def host_kernels() -> ctypes.CDLL:
    """The host build of the kernels, made by CMake once on a machine."""

    def make(build: Path) -> None:
        for command in (["cmake", "-S", str(ROOT), "-B", str(build)], ["cmake", "--build", str(build)]):
            subprocess.run(command, check=True, capture_output=True)

    sources = (ROOT / "CMakeLists.txt", *sorted((ROOT / "native").iterdir()))
    built = made_once(b"".join(file.read_bytes() for file in sources), (), make)
    return ctypes.CDLL(str(built / "libdiagd_step_kernels.so"))


class HostDevice(host.HostDevice):
    """Runs what is queued at once; ``log`` has the name and numbers of every operation."""

    def __init__(self, kernels: ctypes.CDLL | None) -> None:
        super().__init__(kernels)
        self.log: list[tuple[Any, ...]] = []

    def allocate(self, size: int) -> int:
        self.log.append(("allocate", size))
        return super().allocate(size)

    def replay(self, graph: int) -> None:
        self.log.append(("replay", graph))
        super().replay(graph)

    def synchronise(self) -> None:
        self.log.append(("synchronise",))

    def close(self) -> None:
        self.log.append(("close",))
        super().close()

    def run(self, operation: Callable[[], object], *entry: object) -> None:
        if self._capturing is None:
            self.log.append(entry)
        super().run(operation)


class CapturableProgram:
    """ONNX Runtime's program behind the device's queue, so that graphs contain it."""

    capturable = True

    def __init__(self, device: HostDevice, program: OnnxRuntimeProgram) -> None:
        self._device, self._program = device, program

    def enqueue(self, width: int) -> None:
        self._device.run(partial(self._program.enqueue, width), "program", width)


def executor_over(
    bundle: Bundle, form: Form, tokens: int, device: HostDevice, *, graphs: bool = True
) -> Executor:
    """The executor over a recording device, its graphs captured."""
    steps = graphs_of(bundle, form)
    widths = widths_of(steps)
    session = onnxruntime.InferenceSession(str(bundle.file(steps[0].file)))

    def program(tensors: Mapping[str, Tensor]) -> CapturableProgram:
        return CapturableProgram(device, OnnxRuntimeProgram(session, tensors, widths, "cpu"))

    options = StepOptions(0, tokens, graphs=graphs)
    return Executor(bundle.manifest, steps[0], widths, options, device, program)


def view(tensor: Tensor) -> Array:
    """The memory of a tensor of fixed shape on a host device."""
    size = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.address))
    return raw.view(tensor.dtype).reshape(tensor.shape)


def buffers(engine: Executor) -> dict[str, Array]:
    """The K/V buffers [1, G, S, D] of an executor over a host device."""
    return {name: view(tensor) for name, tensor in engine.tensors.cache.items()}
