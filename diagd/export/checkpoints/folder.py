"""Checkpoints made of several files: which file of a folder to open, and sharded sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

from diagd.errors import CheckpointError
from diagd.export.checkpoints.checkpoint import Checkpoint, TensorHandle

_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".jit")
_PREFERRED = (
    "model.safetensors.index.json",
    "model.safetensors",
    "model.pt",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "autoencoder.jit",  # holds what encoder.jit and decoder.jit hold
)


def is_index(name: str) -> bool:
    """Whether a file name is that of the index of a sharded set."""
    return name.lower().endswith(_INDEX_SUFFIXES)


def is_checkpoint_name(name: str) -> bool:
    """Whether a file name ends as checkpoints do, in whatever case."""
    return name.lower().endswith((*_SUFFIXES, *_INDEX_SUFFIXES))


def choose_file(names: Collection[str], source: str) -> str:
    """The file to open among the names of a folder (not of its subfolders; hidden ones do not count).

    An index or a file of a usual name wins; otherwise there must be a single candidate.

    Raises:
        CheckpointError: there is no candidate, or more than one.
    """
    shown = sorted(name for name in names if not name.startswith("."))
    for preferred in _PREFERRED:
        for name in shown:
            if name.lower() == preferred:
                return name
    found = [name for name in shown if is_index(name)]
    found = found or [name for name in shown if is_checkpoint_name(name)]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
        raise CheckpointError(f"{source} holds {len(found)} checkpoints ({several}); name the one you want")
    held = ", ".join(shown[:8]) or "no file"
    raise CheckpointError(
        f"{source} holds no checkpoint: found {held}, expected a file ending in {', '.join(_SUFFIXES)}"
    )


def shard_names(index: Path) -> dict[str, str]:
    """File of each tensor of a sharded set, from its index (``weight_map``).

    Raises:
        CheckpointError: the index is malformed or names something other than files beside it.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(tensor): str(shard) for tensor, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is not the index of a sharded checkpoint ({type(error).__name__}: {error}): expected "
            "an object with 'weight_map'; download it again"
        ) from error
    for shard in shards.values():
        if PurePosixPath(shard).name != shard or "\\" in shard or not is_checkpoint_name(shard):
            raise CheckpointError(
                f"{index} names the shard '{shard}', expected a file beside the index; do not use this file"
            )
    return shards


def read_sharded(index: Path, read: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Open a sharded set as one checkpoint.

    Args:
        index: its index file; the shards lie beside it.
        read: opens one shard.

    Raises:
        CheckpointError: a shard is missing (all missing ones are named) or lacks a tensor of the index.
    """
    files = shard_names(index)
    needed = dict.fromkeys(files.values())
    absent = [shard for shard in needed if not (index.parent / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{index.parent} lacks {len(absent)} of {len(needed)} shards: {', '.join(absent)}; "
            "download them into the same folder"
        )
    shards = {shard: read(index.parent / shard) for shard in needed}
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
