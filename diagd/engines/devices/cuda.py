"""A CUDA device through ``cuda.bindings``: one stream, one allocation list, graphs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from typing_extensions import override

from diagd.engines.devices import Array, KernelDevice
from diagd.engines.devices.kernels import CHUNK_BYTES, KERNELS, built_ptx, compile_kernels
from diagd.errors import EngineError, require


@dataclass(frozen=True)
class DeviceDescription:
    """What engines depend on: name of the GPU, compute capability as ``sm90``, driver version."""

    name: str
    target: str
    driver: str


def check(outcome: tuple[Any, ...]) -> Any:
    """The results of a driver or NVRTC call; EngineError where it failed."""
    status, *results = outcome
    if int(status) != 0:
        raise EngineError(f"CUDA failed with {status.name} ({int(status)}); `diagd doctor` checks the driver")
    return results[0] if len(results) == 1 else tuple(results)


def open_driver() -> ModuleType:
    """The initialised CUDA driver API.

    Raises:
        DependencyError: cuda-bindings is not installed.
        EngineError: this machine has no CUDA driver or device.
    """
    driver = require("cuda.bindings.driver", extra="cuda", purpose="run engines on an NVIDIA GPU")
    try:
        check(driver.cuInit(0))
        devices = check(driver.cuDeviceGetCount())
    except (EngineError, RuntimeError) as error:
        raise EngineError(f"no CUDA device: {str(error).rstrip('.')}") from error
    if not devices:
        raise EngineError("no CUDA device: the driver finds none; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return driver


def describe_device(driver: ModuleType) -> DeviceDescription:
    """Name, compute capability and driver of the first GPU."""
    device = check(driver.cuDeviceGet(0))
    attribute = driver.CUdevice_attribute
    major = check(driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
    minor = check(driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    version = check(driver.cuDriverGetVersion())
    name = bytes(check(driver.cuDeviceGetName(128, device))).split(b"\0")[0].decode()
    return DeviceDescription(name, f"sm{major}{minor}", f"{version // 1000}.{version % 1000 // 10}")


class CudaDevice(KernelDevice):
    """The first GPU; everything allocated is freed by ``close``."""

    kind, ahead, chunk_bytes, threads = "cuda", True, CHUNK_BYTES, 512

    def __init__(self) -> None:
        self._cuda = open_driver()
        self.description = describe_device(self._cuda)
        self._device = check(self._cuda.cuDeviceGet(0))
        check(self._cuda.cuCtxSetCurrent(check(self._cuda.cuDevicePrimaryCtxRetain(self._device))))
        # ONNX Runtime captures in global mode, which would forbid this thread's calls while others capture.
        own = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        check(self._cuda.cuThreadExchangeStreamCaptureMode(own))
        # Blocking flags would tie the stream to the legacy default stream, which cannot be captured.
        self._stream = check(self._cuda.cuStreamCreate(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = int(self._stream)
        self._memory: list[Any] = []
        self._host_memory: list[int] = []
        self._graphs: list[Any] = []
        self._marks: list[Any] = []
        self._modules: list[Any] = []
        self.architecture = int(self.description.target[2:])
        self.processors = self._attribute("MULTIPROCESSOR_COUNT")
        self.block_bytes = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        ptx = built_ptx()
        self._functions = self.load(ptx + b"\0" if ptx else compile_kernels(self.architecture), KERNELS)

    def _attribute(self, name: str) -> int:
        attribute = getattr(self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(check(self._cuda.cuDeviceGetAttribute(attribute, self._device)))

    @override
    def load(self, code: bytes, names: Sequence[str], shared: int = 0) -> Mapping[str, Any]:
        module = check(self._cuda.cuModuleLoadData(code))
        self._modules.append(module)
        found = {name: check(self._cuda.cuModuleGetFunction(module, name.encode())) for name in names}
        most = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for function in found.values() if shared else ():
            check(self._cuda.cuFuncSetAttribute(function, most, shared))
        return found

    @override
    def allocate(self, size: int) -> int:
        memory = check(self._cuda.cuMemAlloc(max(size, 1)))
        self._memory.append(memory)
        # On the stream: the legacy one does not order with it, and could zero what a first copy has written.
        check(self._cuda.cuMemsetD8Async(memory, 0, max(size, 1), self._stream))
        return int(memory)

    @override
    def host_array(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        address = int(check(self._cuda.cuMemHostAlloc(max(size, 1), 0)))
        self._host_memory.append(address)
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        raw[:] = 0
        return raw.view(dtype).reshape(shape)

    @override
    def upload(self, address: int, array: Array) -> None:
        check(self._cuda.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self._stream))

    @override
    def download(self, array: Array, address: int) -> None:
        check(self._cuda.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, self._stream))

    @override
    def copy(self, target: int, source: int, size: int) -> None:
        check(self._cuda.cuMemcpyDtoDAsync(target, source, size, self._stream))

    @override
    def clear(self, address: int, size: int) -> None:
        check(self._cuda.cuMemsetD8Async(address, 0, size, self._stream))

    @override
    def launch(self, kernel: str, arguments: ctypes.Structure, blocks: int, threads: int) -> None:
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        grid, block = (blocks, 1, 1), (threads, 1, 1)
        function = self._functions[kernel]
        outcome = self._cuda.cuLaunchKernel(
            function, *grid, *block, 0, self._stream, ctypes.addressof(pointers), 0
        )
        check(outcome)

    @override
    def capture(self, work: Callable[[], None]) -> int:
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        check(self._cuda.cuStreamBeginCapture(self._stream, mode))
        try:
            work()
        finally:
            graph = check(self._cuda.cuStreamEndCapture(self._stream))
        self._graphs.append(check(self._cuda.cuGraphInstantiate(graph, 0)))
        check(self._cuda.cuGraphDestroy(graph))
        return len(self._graphs) - 1

    @override
    def replay(self, graph: int) -> None:
        check(self._cuda.cuGraphLaunch(self._graphs[graph], self._stream))

    @override
    def synchronise(self) -> None:
        check(self._cuda.cuStreamSynchronize(self._stream))

    @override
    def mark(self, number: int) -> None:
        """CUDA events have a resolution of half a microsecond."""
        while len(self._marks) <= number:
            self._marks.append(check(self._cuda.cuEventCreate(self._cuda.CUevent_flags.CU_EVENT_DEFAULT)))
        check(self._cuda.cuEventRecord(self._marks[number], self._stream))

    @override
    def seconds(self, first: int, last: int) -> float:
        self.synchronise()
        return 1e-3 * float(check(self._cuda.cuEventElapsedTime(self._marks[first], self._marks[last])))

    @override
    def memory_used(self) -> int:
        free, total = check(self._cuda.cuMemGetInfo())
        return int(total) - int(free)

    @override
    def close(self) -> None:
        self.synchronise()
        for event in self._marks:
            check(self._cuda.cuEventDestroy(event))
        for graph in self._graphs:
            check(self._cuda.cuGraphExecDestroy(graph))
        for memory in self._memory:
            check(self._cuda.cuMemFree(memory))
        for address in self._host_memory:
            check(self._cuda.cuMemFreeHost(address))
        for module in self._modules:
            check(self._cuda.cuModuleUnload(module))
        check(self._cuda.cuStreamDestroy(self._stream))
        check(self._cuda.cuDevicePrimaryCtxRelease(self._device))
