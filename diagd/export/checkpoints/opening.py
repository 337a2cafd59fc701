"""From what the user typed to a checkpoint: a file, a folder or a Hugging Face repository."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from diagd.errors import CheckpointError, require
from diagd.export.checkpoints import folder, hub
from diagd.export.checkpoints.checkpoint import Checkpoint, select

_PICKLE_STARTS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_APPLE_DOUBLE = b"\x00\x05\x16\x07"
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
    if text.startswith("hf:"):
        path, source = hub.fetch(text)
        found = _open_path(path, text)
        return _unwrapped(Checkpoint(found, source=source, metadata=found.metadata))
    return _unwrapped(_open_path(Path(text).expanduser(), text))


def _unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    names = [_WRAPPERS.sub("", name) for name in checkpoint]
    skipped = len(_DISTRIBUTED) if names and all(name.startswith(_DISTRIBUTED) for name in names) else 0
    return select(checkpoint, lambda name: _WRAPPERS.sub("", name)[skipped:])


def _open_path(path: Path, spec: str) -> Checkpoint:
    try:
        if path.is_dir():
            names = [entry.name for entry in path.iterdir() if entry.is_file()]
            path = path / folder.choose_file(names, str(path))
        elif not path.exists():
            raise _no_such_path(path, spec)
        elif not path.is_file():
            raise CheckpointError(f"{path} is neither a file nor a folder")
        return _open_file(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; check its permissions"
        ) from error


def _open_file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(512)
    if problem := _no_checkpoint(path, start):
        raise CheckpointError(f"{path} {problem}")
    if folder.is_index(path.name):
        return folder.read_sharded(path, _open_file)
    if start.startswith(b"PK"):
        require("torch", extra="export", purpose="read checkpoints of PyTorch")
        from diagd.export.checkpoints.torch_file import read_torch

        return read_torch(path)
    if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        require("safetensors", extra="export", purpose="read safetensors checkpoints")
        from diagd.export.checkpoints.safetensors_file import read_safetensors

        return read_safetensors(path)
    raise CheckpointError(
        f"{path} is not a checkpoint: it begins with {start[:8]!r}, expected a safetensors file or a zip "
        "that PyTorch wrote (.pt, .ckpt, .bin, .jit)"
    )


def _no_checkpoint(path: Path, start: bytes) -> str | None:
    """What a file is by its first bytes, where it is no checkpoint that can be read."""
    if not start:
        return "is empty; download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run: git lfs pull"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        return "is a web page, not a checkpoint; download it again, signed in"
    if start.startswith(_APPLE_DOUBLE):
        return f"holds what macOS notes about a file; pass the file itself, {path.name.removeprefix('._')}"
    if start.startswith(_PICKLE_STARTS) or start[257:262] == b"ustar":
        return (
            "is in the format PyTorch wrote before 1.6, which cannot be mapped; convert it with: "
            f"python -c \"import torch; torch.save(torch.load('{path}', map_location='cpu', "
            f"weights_only=True), '{path.with_suffix('')}-zip{path.suffix}')\""
        )
    return None


def _no_such_path(path: Path, spec: str) -> CheckpointError:
    """An error that names the likely cause: a repository of the Hub, a dangling link, a near name."""
    wrong = f"no checkpoint at '{path}'"
    if address := hub.guess_address(spec):
        return CheckpointError(f"{wrong}: no such file or folder; did you mean '{address}'?")
    if path.is_symlink():
        return CheckpointError(f"{wrong}: it is a link to '{path.readlink()}', which does not exist")
    home = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(home).parts[0]
    what = "no such file or folder" if home == path.absolute().parent else f"'{home}' has no '{missing}'"
    return CheckpointError(f"{wrong}: {what}{_near(missing, home)}")


def _near(name: str, home: Path) -> str:
    try:
        present = sorted(entry.name for entry in home.iterdir() if not entry.name.startswith("."))
    except OSError:
        return ""
    if close := difflib.get_close_matches(name, present, n=3, cutoff=0.5):
        return "; did you mean " + " or ".join(f"'{home / near}'" for near in close) + "?"
    held = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "")
    return f"; {home} holds {held or 'nothing'}"
