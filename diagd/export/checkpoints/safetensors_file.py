"""Reader of safetensors files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # teaches NumPy the name bfloat16
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from diagd.errors import CheckpointError
from diagd.export.checkpoints.checkpoint import Checkpoint, TensorHandle

_KINDS = {"F": "float", "I": "int", "U": "uint"}
_DTYPES = {f"{code}{bits}": f"{kind}{bits}" for code, kind in _KINDS.items() for bits in (8, 16, 32, 64)}
_DTYPES |= {"BF16": "bfloat16", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


@dataclass(frozen=True)
class SafeTensor(TensorHandle):
    """A tensor of a file, which is mapped for the time of a read, so that its pages go again."""

    file: Path
    name: str

    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        if not self.size:
            return np.empty((stop - start, *self.shape[1:]), self.dtype)
        try:
            with safe_open(self.file, framework="np") as tensors:
                whole = stop - start == (self.shape or (1,))[0]
                rows = tensors.get_tensor(self.name) if whole else tensors.get_slice(self.name)[start:stop]
                return np.asarray(rows)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.file} changed since it was opened: '{self.name}' cannot be read ({error}); run again "
                "once the file is complete"
            ) from error


def read_safetensors(path: Path) -> Checkpoint:
    """Open one safetensors file by its header; ``metadata`` is its ``__metadata__``, strings by name.

    Raises:
        CheckpointError: the file is cut short, or its header is malformed or lies.
    """
    try:
        with safe_open(path, framework="np") as file:
            parts = {name: file.get_slice(name) for name in sorted(file.keys())}
            metadata = file.metadata()
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is cut short or is not a safetensors file: its {path.stat().st_size} bytes do not fit "
            f"its header ({error}); download it again"
        ) from error
    tensors = {
        name: SafeTensor(tuple(part.get_shape()), _DTYPES.get(code := part.get_dtype(), code), path, name)
        for name, part in parts.items()
    }
    return Checkpoint(tensors, source=str(path), metadata=metadata)
