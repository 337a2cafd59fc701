"""Traced graphs that this machine keeps: tracing takes seconds, and depends on dimensions and code alone."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

import diagd
from diagd.bundle import cache
from diagd.errors import require

if TYPE_CHECKING:
    import onnx_ir as ir

KIND = "graphs"
"""Of the cache's entries."""


def traced_once(module: nn.Module, settings: object, make: Callable[[], ir.Model]) -> ir.Model:
    """The graph of a module, traced where this machine does not know it.

    ``settings``: whatever else the graph depends on, as JSON can express it. ``make`` traces it; initializers
    that are parameters and buffers of the module have no data.
    """
    require("onnxscript", extra="export", purpose="write ONNX graphs")
    key = hashlib.sha256(json.dumps([_code(), settings, _described(module)]).encode()).hexdigest()[:32]
    if (known := cache.read(KIND, key)) is None:
        known = _written(make(), module)
        cache.write(KIND, key, known)
    return _read(known)  # a graph that was just traced would get other names from passes over it


def _described(module: nn.Module) -> list[object]:
    """Class, tensors and attributes of a module and of all within it."""
    return [
        [
            name,
            f"{type(part).__module__}.{type(part).__qualname__}",
            [
                [key, [*tensor.shape], str(tensor.dtype)]
                for key, tensor in _tensors(part, recurse=False).items()
            ],
            json.dumps(vars(part), default=_told, skipkeys=True),
        ]
        for name, part in module.named_modules()
    ]


def _tensors(module: nn.Module, *, recurse: bool) -> dict[str, Tensor]:
    named = (module.named_parameters, module.named_buffers)
    return {name: tensor for each in named for name, tensor in each(recurse=recurse)}


def _told(value: object) -> object:
    """An attribute that JSON does not know: settings by all that they hold, others by their kind."""
    if isinstance(value, torch.dtype) or (is_dataclass(value) and not isinstance(value, type)):
        return repr(value)
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return getattr(value, "__qualname__", type(value).__qualname__)


@lru_cache
def _code() -> list[str]:
    """Who traces: every module of the package, and versions of what it traces with."""
    folder = Path(diagd.__file__).parent
    sources = hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(folder.rglob("*.py"))))
    packages = ("torch", "onnx", "onnxscript", "onnx-ir")
    return [sources.hexdigest(), platform.python_version(), *map(version, packages)]


def _written(model: ir.Model, module: nn.Module) -> bytes:
    """A graph whose weights say type and shape only."""
    import onnx_ir as ir

    for name in _tensors(module, recurse=True):
        value = model.graph.initializers.get(name)
        if value is not None and value.dtype is not None and value.shape is not None:
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
