"""Checkpoints: named tensors in released file formats, read tensor by tensor and never executed.

A checkpoint of any format is told by its content: a file, a sharded set, a folder, a repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from diagd.bundle.files import instead
from diagd.errors import CheckpointError, require
from diagd.export.checkpoints.checkpoint import (
    WEIGHT_DTYPES,
    Checkpoint,
    RandomCheckpoint,
    TensorHandle,
    check,
    initial_moments,
    read_safetensors,
    select,
)
from diagd.export.checkpoints.location import fetch, is_index, local_file, shard_names

__all__ = [
    "WEIGHT_DTYPES",
    "Checkpoint",
    "RandomCheckpoint",
    "TensorHandle",
    "check",
    "initial_moments",
    "open_checkpoint",
    "select",
]

_PICKLE_STARTS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DISTRIBUTED = "module."


def open_checkpoint(spec: str | Path) -> Checkpoint:
    """Open a checkpoint without reading a tensor.

    Names are those of the model itself: what `torch.compile`, `DistributedDataParallel` and FSDP add to
    them is taken off.

    Args:
        spec: a file (safetensors, `torch.save`, Lightning, TorchScript; told by content), the index of a
            sharded set, a folder with one of these, or ``hf://org/name[@revision][/subpath]``.

    Raises:
        CheckpointError: nothing is there, or it is damaged, hostile, unsupported or out of reach.
        DependencyError: huggingface_hub is needed and not installed.
    """
    text = os.fspath(spec)
    if not text.strip():
        raise CheckpointError("the path of the checkpoint is empty; is a variable of the shell not set?")
    path, source = fetch(text) if text.startswith("hf:") else (Path(text).expanduser(), None)
    try:
        found = _open_file(local_file(path, text))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; check its permissions"
        ) from error
    names = [_WRAPPERS.sub("", name) for name in found]
    skipped = len(_DISTRIBUTED) if names and all(name.startswith(_DISTRIBUTED) for name in names) else 0
    opened = select(found, lambda name: _WRAPPERS.sub("", name)[skipped:])
    opened.source = source or opened.source
    return opened


def _open_file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(512)
    if problem := instead(path) or _old_format(path, start):
        raise CheckpointError(f"{path} {problem}")
    if is_index(path.name):
        return _open_shards(path)
    if start.startswith(b"PK"):
        require("torch", extra="export", purpose="read checkpoints of PyTorch")
        from diagd.export.checkpoints.torch_file import read_torch

        return read_torch(path)
    if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        return read_safetensors(path)
    raise CheckpointError(
        f"{path} is not a checkpoint: it begins with {start[:8]!r}, expected a safetensors file or a zip "
        "that PyTorch wrote (.pt, .ckpt, .bin, .jit)"
    )


def _open_shards(index: Path) -> Checkpoint:
    """A sharded set as one checkpoint; all missing shards are named."""
    files = shard_names(index)
    needed = dict.fromkeys(files.values())
    absent = [shard for shard in needed if not (index.parent / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{index.parent} lacks {len(absent)} of {len(needed)} shards: {', '.join(absent)}; "
            "download them into the same folder"
        )
    shards = {shard: _open_file(index.parent / shard) for shard in needed}
    tensors: dict[str, TensorHandle] = {}
    for name, shard in files.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index.parent / shard} lacks tensor '{name}', which {index.name} places there; "
                "index and shards are of different versions: download both again"
            )
        tensors[name] = shards[shard][name]
    metadata = {key: value for shard in shards.values() for key, value in shard.metadata.items()}
    return Checkpoint(tensors, source=str(index), metadata=metadata)


def _old_format(path: Path, start: bytes) -> str | None:
    """What is to be done with a file that PyTorch cannot map."""
    if start.startswith(_PICKLE_STARTS) or start[257:262] == b"ustar":
        return (
            "is in the format PyTorch wrote before 1.6, which cannot be mapped; convert it with: "
            f"python -c \"import torch; torch.save(torch.load('{path}', map_location='cpu', "
            f"weights_only=True), '{path.with_suffix('')}-zip{path.suffix}')\""
        )
    return None
