"""Reader of safetensors files: 8-byte header length, JSON header, raw tensors."""

from __future__ import annotations

import json
from pathlib import Path

from diagd.errors import CheckpointError
from diagd.export.checkpoints.checkpoint import Checkpoint
from diagd.export.checkpoints.tensors import (
    MappedTensor,
    TensorHandle,
    UnreadableTensor,
    contiguous_strides,
    is_readable,
    item_bytes,
)

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_HEADER_LIMIT = 100_000_000  # as in the reference implementation


def read_safetensors(path: Path) -> Checkpoint:
    """Open one safetensors file; only its header is read.

    ``metadata`` is the header's ``__metadata__``, strings by name.

    Raises:
        CheckpointError: the file is cut short or its header is malformed.
    """
    header, begin = _read_header(path)
    metadata = header.pop("__metadata__", {})
    room = path.stat().st_size - begin
    tensors = {name: _tensor(path, name, entry, begin, room) for name, entry in header.items()}
    return Checkpoint(
        tensors, source=str(path), metadata=dict(metadata) if isinstance(metadata, dict) else None
    )


def _read_header(path: Path) -> tuple[dict[str, object], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= _HEADER_LIMIT else b""
    if len(text) != length or length == 0:
        raise CheckpointError(
            f"{path} is cut short or is not a safetensors file: it announces a header of {length} bytes and "
            f"has {path.stat().st_size} bytes in all; download it again"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a damaged safetensors header ({error}); download it again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a safetensors header that is not an object; download it again")
    return header, 8 + length


def _tensor(path: Path, name: str, entry: object, begin: int, room: int) -> TensorHandle:
    try:
        code, shape, first, last = _fields(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} describes tensor '{name}' as {str(entry)[:200]}, expected dtype, shape and "
            "data_offsets; download it again"
        ) from error
    dtype = _DTYPES.get(code, code)
    if last > room:
        raise CheckpointError(
            f"{path} is cut short: tensor '{name}' ends at byte {begin + last}, the file at {begin + room}; "
            "download it again"
        )
    if not is_readable(dtype):
        return UnreadableTensor(shape, dtype, last - first)
    tensor = MappedTensor(shape, dtype, path, begin + first, contiguous_strides(shape))
    if tensor.nbytes != last - first:
        raise CheckpointError(
            f"{path} gives tensor '{name}' {last - first} bytes, but {dtype} {list(shape)} takes "
            f"{item_bytes(dtype) * tensor.size}; download it again"
        )
    return tensor


def _fields(entry: object) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict):
        raise TypeError("not an object")
    shape, offsets = entry["shape"], entry["data_offsets"]
    first, last = offsets
    numbers = [*shape, first, last]
    if not all(type(number) is int and number >= 0 for number in numbers) or first > last:
        raise ValueError("sizes and offsets are non-negative integers in order")
    return str(entry["dtype"]), tuple(shape), first, last
