"""Traced graphs that this machine keeps: tracing takes seconds, and depends on dimensions and code alone."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import is_dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import diagd
from diagd.bundle import cache
from diagd.errors import require
from diagd.export.tracing import Functions, trace

if TYPE_CHECKING:
    import onnx_ir as ir

KIND = "graphs"
"""Of the cache's entries."""


def traced_once(
    module: nn.Module, inputs: tuple[Any, ...], *, functions: Functions | None = None, **how: Any
) -> ir.Model:
    """What ``trace`` makes of the same arguments, traced where this machine does not know it.

    Initializers that are parameters and buffers of the module have no data.
    """
    require("onnxscript", extra="export", purpose="write ONNX graphs")
    told = json.dumps([_code(), described(module), inputs, how], default=_told, skipkeys=True)
    key = hashlib.sha256(told.encode()).hexdigest()[:32]
    if (known := cache.read(KIND, key)) is None:
        known = _written(trace(module, inputs, functions=functions, **how))
        cache.write(KIND, key, known)
    return _read(known)  # a graph that was just traced would get other names from passes over it


def described(module: nn.Module) -> str:
    """All that a graph depends on of a module and of those within it."""
    parts = [[name, _kind(type(part)), vars(part)] for name, part in module.named_modules()]
    return json.dumps(parts, default=_told, skipkeys=True)


def _told(value: object) -> object:
    """What JSON does not know: settings by all that they hold, tensors by type and shape, others by kind."""
    if isinstance(value, Tensor):
        return [str(value.dtype), *value.shape]
    if isinstance(value, torch.dtype) or (is_dataclass(value) and not isinstance(value, type)):
        return repr(value)
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return _kind(value if hasattr(value, "__qualname__") else type(value))


def _kind(what: Any) -> str:
    return f"{what.__module__}.{what.__qualname__}"


@lru_cache
def _code() -> list[str]:
    """Who traces: every module of the package, and versions of what it traces with."""
    folder = Path(diagd.__file__).parent
    sources = hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(folder.rglob("*.py"))))
    packages = ("torch", "onnx", "onnxscript", "onnx-ir")
    return [sources.hexdigest(), platform.python_version(), *map(version, packages)]


def _written(model: ir.Model) -> bytes:
    """A graph whose weights say type and shape only."""
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        if value.const_value is None and value.dtype is not None and value.shape is not None:
            value.const_value = ir.ExternalTensor("-", 0, 0, value.dtype, shape=value.shape, name=name)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _read(known: bytes) -> ir.Model:
    import onnx
    import onnx_ir as ir

    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(known))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model
