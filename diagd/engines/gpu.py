"""Engines on an NVIDIA GPU: TensorRT's, or ONNX Runtime's CUDA provider."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from diagd.bundle import Bundle, Form
from diagd.engines.cuda.device import Device
from diagd.engines.cuda.driver import CudaDevice
from diagd.engines.cuda.engine import DeviceEngine
from diagd.engines.cuda.onnxruntime import OnnxRuntimeProgram, open_cuda_session
from diagd.engines.cuda.program import Tensor
from diagd.engines.fixed import graphs_of
from diagd.engines.tensorrt.opening import open_tensorrt

BACKENDS = ("tensorrt", "tensorrt_rtx", "cuda")

AnyDevice = TypeVar("AnyDevice", bound=Device)


def open_gpu_engine(
    bundle: Bundle, tokens: int, backend: str, *, graphs: bool = True, strict: bool = False
) -> DeviceEngine:
    """An engine on the first GPU.

    Args:
        bundle: with a ``modern`` graph (``cuda``) or an engine made by diagd-build (``tensorrt``).
        tokens: size of the token buffer; for TensorRT that of the model's whole context.
        backend: one of ``BACKENDS``; ``tensorrt`` is either TensorRT, whichever is installed.
        graphs: capture and replay CUDA graphs.
        strict: of ``cuda``: refuse a graph of which nodes are left to the CPU.

    Raises:
        EngineError: there is no GPU, or no engine that fits it.
        DependencyError: a package is missing.
    """
    with closed_on_failure(CudaDevice()) as device:
        if backend != "cuda":
            runtime = None if backend == "tensorrt" else backend
            return open_tensorrt(bundle, tokens, device, runtime=runtime, graphs=graphs)
        return open_cuda(bundle, tokens, device, graphs=graphs, strict=strict)


@contextmanager
def closed_on_failure(device: AnyDevice) -> Iterator[AnyDevice]:
    """Give a device's memory back if what is opened on it cannot be opened; else it lives on."""
    try:
        yield device
    except BaseException:
        device.close()
        raise


def open_cuda(
    bundle: Bundle,
    tokens: int,
    device: CudaDevice,
    *,
    graphs: bool = True,
    keep_logits: bool = False,
    strict: bool = False,
) -> DeviceEngine:
    """The ``modern`` form on ONNX Runtime's CUDA provider; see ``open_gpu_engine``.

    With ``strict``, a graph of which nodes are left to the CPU is refused.
    """
    steps = graphs_of(bundle, Form.MODERN)
    widths = tuple(int(graph.width or 0) for graph in steps)
    session = open_cuda_session(bundle.file(steps[0].file), device, graphs, strict=strict)

    def program(tensors: Mapping[str, Tensor]) -> OnnxRuntimeProgram:
        return OnnxRuntimeProgram(session, tensors, widths, device.kind)

    capacity = int(steps[0].capacity or 0)
    return DeviceEngine(
        bundle.manifest, Form.MODERN, capacity, widths, tokens, device, program, keep_logits=keep_logits
    )
