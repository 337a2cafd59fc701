"""From what the user typed to a checkpoint: a file, a folder or a Hugging Face repository."""

from __future__ import annotations

from pathlib import Path

from diagd.errors import CheckpointError
from diagd.export.checkpoints import folder, hub
from diagd.export.checkpoints.checkpoint import Checkpoint
from diagd.export.checkpoints.missing_path import no_such_path
from diagd.export.checkpoints.safetensors_file import read_safetensors
from diagd.export.checkpoints.torch_file import read_torch

_PICKLE_STARTS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))


def open_checkpoint(spec: str | Path) -> Checkpoint:
    """Open a checkpoint without reading a tensor.

    Args:
        spec: a file (safetensors, `torch.save`, Lightning, TorchScript; told by content), the index of a
            sharded set, a folder with one of these, or ``hf://org/name[@revision][/subpath]``.

    Raises:
        CheckpointError: nothing is there, or it is damaged, hostile, unsupported or out of reach.
        DependencyError: huggingface_hub is needed and not installed.
    """
    if isinstance(spec, str) and spec.startswith("hf:"):
        fetched = hub.fetch(spec)
        found = _open_path(fetched.path)
        return Checkpoint(found, source=fetched.source, metadata=found.metadata)
    return _open_path(Path(spec).expanduser())


def _open_path(path: Path) -> Checkpoint:
    try:
        if path.is_dir():
            names = [entry.name for entry in path.iterdir() if entry.is_file()]
            path = path / folder.choose_file(names, str(path))
        elif not path.exists():
            raise no_such_path(str(path))
        elif not path.is_file():
            raise CheckpointError(f"{path} is neither a file nor a folder")
        if path.name.endswith(folder.INDEX_SUFFIXES):
            return folder.read_sharded(path, _open_file)
        return _open_file(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; check its permissions"
        ) from error


def _open_file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise CheckpointError(f"{path} is empty; download it again")
    if start.startswith(b"PK"):
        return read_torch(path)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return read_safetensors(path)
    raise _unknown_format(path, start)


def _unknown_format(path: Path, start: bytes) -> CheckpointError:
    if start.startswith(_PICKLE_STARTS) or start[257:262] == b"ustar":
        return CheckpointError(
            f"{path} is in the format PyTorch wrote before 1.6, which cannot be mapped; convert it with: "
            f"python -c \"import torch; torch.save(torch.load('{path}', map_location='cpu', "
            f"weights_only=True), '{path.with_suffix('')}-zip{path.suffix}')\""
        )
    if start.startswith(b"version https://git-lfs"):
        return CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run: git lfs pull")
    if start.lstrip()[:1] == b"<":
        return CheckpointError(f"{path} is a web page, not a checkpoint; download it again, signed in")
    return CheckpointError(
        f"{path} is not a checkpoint: it begins with {start[:8]!r}, expected a safetensors file or a zip "
        "that PyTorch wrote (.pt, .ckpt, .bin, .jit)"
    )
