"""A backend over memory of the host that runs behind it, as a GPU does, and keeps the devices it made."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime

from diagd.bundle import Bundle, Form
from diagd.engines.backend import Backend, Graph, StepOptions, choose_form, find
from diagd.engines.ceilings import Ceilings, device_ceilings
from diagd.engines.executor import Executor
from diagd.engines.onnxruntime_session import CpuOptions, OnnxRuntimeProgram
from diagd.engines.tensors import Tensor
from tests.engines.host_device import HostDevice, executor_over

SIDE, COPIED = 32, 1 << 16


@dataclass
class Workshop(Backend):
    kernels: ctypes.CDLL
    devices: list[HostDevice] = field(default_factory=list)
    before_step: Callable[[], None] = lambda: None
    name: str = "host"
    forms: tuple[Form, ...] = (Form.MODERN, Form.PORTABLE)

    def device(self) -> HostDevice:
        self.devices.append(LaggingDevice(self))
        return self.devices[-1]

    def describe(self) -> str:
        return "host memory"

    def open_steps(self, bundle: Bundle, options: StepOptions) -> Executor:
        form = choose_form(bundle, options.form, self.forms)
        return executor_over(bundle, form, options.tokens, self.device(), graphs=options.graphs)

    def open_graph(self, path: Path, digest: str, options: CpuOptions) -> Graph:
        return find("cpu").open_graph(path, digest, options)

    def ceilings(self, threads: int = 0) -> Ceilings:
        def product(model: Path, rows: int, tensors: Mapping[str, Tensor]) -> OnnxRuntimeProgram:
            session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
            return OnnxRuntimeProgram(session, tensors, (rows,), "cpu")

        with closing(self.device()) as device:
            return device_ceilings(device, product, SIDE, COPIED)


class LaggingDevice(HostDevice):
    """Does something ahead of every program that it runs."""

    ahead = True

    def __init__(self, workshop: Workshop) -> None:
        super().__init__(workshop.kernels)
        self._workshop = workshop

    def run(self, operation: Callable[[], object], *entry: object) -> None:
        def work() -> None:
            self._workshop.before_step()
            operation()

        super().run(work if entry[0] == "program" else operation, *entry)
