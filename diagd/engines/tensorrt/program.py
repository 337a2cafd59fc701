"""A compiled TensorRT engine bound to fixed addresses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from diagd.engines.tensorrt.build_log import LogLine, errors_of, make_logger
from diagd.engines.tensors import Tensor
from diagd.errors import EngineError


class TensorRTProgram:
    """One execution context a width, over one engine and one copy of its weights; see ``Program``.

    Args:
        trt: the TensorRT module the plan was built with.
        plan: serialised engine.
        widths: of its optimization profiles, in their order.
        tensors: memory by tensor name.
        stream: CUDA stream handle.
    """

    capturable = True

    def __init__(
        self,
        trt: ModuleType,
        plan: Path,
        widths: tuple[int, ...],
        tensors: Mapping[str, Tensor],
        stream: int,
    ) -> None:
        self._lines: list[LogLine] = []
        self._logger = make_logger(trt, self._lines)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise EngineError(f"{plan} cannot be loaded: {errors_of(self._lines)}; run diagd-build again")
        self._trt, self._stream = trt, stream
        self._check_aliases(tensors)
        self._contexts = {
            width: self._context(profile, width, tensors) for profile, width in enumerate(widths)
        }

    def enqueue(self, width: int) -> None:
        """Queue one step of ``width`` rows."""
        if not self._contexts[width].execute_async_v3(self._stream):
            raise EngineError(f"TensorRT cannot run a step of width {width}: {errors_of(self._lines)}")

    def _context(self, profile: int, width: int, tensors: Mapping[str, Tensor]) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineError(f"no memory for an execution context: {errors_of(self._lines)}")
        context.set_optimization_profile_async(profile, self._stream)
        for name in self._names():
            if name not in tensors:
                raise EngineError(f"the engine has a tensor '{name}' that diagd does not know; rebuild it")
            if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                context.set_input_shape(name, tensors[name].at_width(width))
            context.set_tensor_address(name, tensors[name].address)
        return context

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def _check_aliases(self, tensors: Mapping[str, Tensor]) -> None:
        """Every output that an engine writes in place must lie where its input lies."""
        if not hasattr(self._engine, "get_aliased_input_tensor"):
            return
        for name in self._names():
            source = self._engine.get_aliased_input_tensor(name)
            if source and tensors[name].address != tensors[source].address:
                raise EngineError(f"the engine writes '{name}' into '{source}', which has another address")
