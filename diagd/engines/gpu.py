"""An NVIDIA GPU: TensorRT's engines, or ONNX Runtime's CUDA provider."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from typing_extensions import override

from diagd.bundle import Bundle, Form
from diagd.engines.backend import Backend, Graph, StepOptions, as_graph, graphs_of, widths_of
from diagd.engines.ceilings import Ceilings, device_ceilings
from diagd.engines.devices import Device
from diagd.engines.devices.cuda import CudaDevice, describe_device, open_driver
from diagd.engines.engine import Engine
from diagd.engines.executor import Executor
from diagd.engines.onnxruntime_session import CpuOptions, OnnxRuntimeProgram, open_cuda_session
from diagd.engines.operators import step_operators
from diagd.engines.tensorrt import import_tensorrt
from diagd.engines.tensorrt.builder import Builder, BuildOptions
from diagd.engines.tensorrt.opening import TensorRTProgram, open_tensorrt
from diagd.engines.tensors import Program, Tensor

AnyDevice = TypeVar("AnyDevice", bound=Device)


class Cuda(Backend):
    """ONNX Runtime's CUDA provider, on the first GPU."""

    name = "cuda"
    forms: tuple[Form, ...] = (Form.MODERN,)

    @override
    def describe(self) -> str:
        """The GPU, its driver and the backend."""
        described = describe_device(open_driver())
        return f"{described.name}, driver {described.driver}, {self.name}"

    @override
    def open_steps(self, bundle: Bundle, options: StepOptions) -> Engine:
        with closed_on_failure(CudaDevice()) as device:
            return open_cuda(bundle, device, options)

    @override
    def open_graph(self, path: Path, digest: str, options: CpuOptions) -> Graph:
        """Pixels and texts stay on the GPU that decodes their tokens."""
        return as_graph(open_cuda_session(path))

    @override
    def ceilings(self, threads: int = 0) -> Ceilings:
        """The product is that of the backend's own library."""
        with closing(CudaDevice()) as device:
            return device_ceilings(device, partial(self._product, device))

    def _product(self, device: Device, model: Path, rows: int, tensors: Mapping[str, Tensor]) -> Program:
        session = open_cuda_session(model, stream=device.stream)
        return OnnxRuntimeProgram(session, tensors, (rows,), device.kind)


class TensorRT(Cuda):
    """Engines compiled by diagd-build, of either TensorRT: whichever is installed.

    Plain graphs run on ONNX Runtime's CUDA provider.
    """

    name = "tensorrt"
    forms = (Form.MODERN, Form.PORTABLE)
    runtime: str | None = None

    @override
    def open_steps(self, bundle: Bundle, options: StepOptions) -> Engine:
        with closed_on_failure(CudaDevice()) as device:
            return open_tensorrt(bundle, options, device, runtime=self.runtime)

    def _product(self, device: Device, model: Path, rows: int, tensors: Mapping[str, Tensor]) -> Program:
        trt = import_tensorrt(self.runtime)
        plan = model.with_suffix(".plan")
        plan.write_bytes(Builder(trt).build(model, BuildOptions((rows,), tokens=0)).plan)
        return TensorRTProgram(trt, plan, (rows,), tensors, device.stream)


class TensorRTRTX(TensorRT):
    """Engines of TensorRT-RTX."""

    name = runtime = "tensorrt_rtx"


@contextmanager
def closed_on_failure(device: AnyDevice) -> Iterator[AnyDevice]:
    """Give a device's memory back if what is opened on it cannot be opened; else it lives on."""
    try:
        yield device
    except BaseException:
        device.close()
        raise


def open_cuda(bundle: Bundle, device: CudaDevice, options: StepOptions) -> Executor:
    """The ``modern`` form on ONNX Runtime's CUDA provider, on a device that is open."""
    steps = graphs_of(bundle, Form.MODERN)
    session = open_cuda_session(
        bundle.file(steps[0].file),
        stream=device.stream,
        graphs=options.graphs,
        strict=options.strict,
        operators=step_operators(bundle.manifest, steps[0], device),
    )
    widths = widths_of(steps)
    bind = partial(OnnxRuntimeProgram, session, widths=widths, kind=device.kind)
    return Executor(bundle.manifest, steps[0], widths, options, device, bind)
