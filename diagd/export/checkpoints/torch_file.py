"""Reader of what `torch.save` writes: a pickled dict of tensors, alone or inside a training checkpoint."""

from __future__ import annotations

from pathlib import Path

from diagd.errors import CheckpointError
from diagd.export.checkpoints.archive import TorchArchive
from diagd.export.checkpoints.checkpoint import Checkpoint
from diagd.export.checkpoints.plain import plain
from diagd.export.checkpoints.restricted_pickle import Opaque, StoredTensor
from diagd.export.checkpoints.torchscript_file import module_tensors

_STATE_KEYS = ("state_dict", "model")  # Lightning (MineWorld, WHAM); Cosmos


def read_torch(path: Path) -> Checkpoint:
    """Open a zip that PyTorch wrote: `torch.save` or TorchScript. Nothing in it is executed.

    Tensors are those under ``state_dict`` or ``model`` where the pickle has such an entry, else those of
    the pickled dict itself, or the parameters and buffers of a TorchScript module. ``metadata`` holds
    ``hyper_parameters`` and the scalars beside ``state_dict`` (epoch, version) as plain data.

    Raises:
        CheckpointError: the file is damaged, compressed, hostile, or holds no dict of tensors.
    """
    with TorchArchive(path) as archive:
        root = archive.load()
        stored = module_tensors(root, path) if archive.is_torchscript else _state_dict(root, path)
        tensors = {name: archive.tensor(name, tensor) for name, tensor in stored.items()}
    if not tensors:
        raise CheckpointError(f"{path} holds no named tensors; expected the weights of a model")
    return Checkpoint(tensors, source=str(path), metadata=_metadata(root))


def _state_dict(root: object, path: Path) -> dict[str, StoredTensor]:
    """The tensors of the state dict, wherever it is."""
    if not isinstance(root, dict):
        kind = root.global_name if isinstance(root, Opaque) else type(root).__name__
        raise CheckpointError(
            f"{path} holds a pickled {kind}, expected a dict of tensors; where its code is installed, run "
            "torch.save(model.state_dict(), 'model.pt')"
        )
    for key in _STATE_KEYS:
        if isinstance(root.get(key), dict):
            return _tensors(root[key])
    found = _tensors(root)
    if not found:
        keys = ", ".join(str(key)[:40] for key in list(root)[:8])
        raise CheckpointError(
            f"{path} holds no tensors at its top level nor under {' or '.join(_STATE_KEYS)}; "
            f"it has: {keys or 'nothing'}"
        )
    return found


def _tensors(entries: dict[object, object]) -> dict[str, StoredTensor]:
    return {
        name: value
        for name, value in entries.items()
        if isinstance(name, str) and isinstance(value, StoredTensor)
    }


def _metadata(root: object) -> dict[str, object]:
    if not isinstance(root, dict):
        return {}
    return {
        str(key): plain(value)
        for key, value in root.items()
        if key == "hyper_parameters" or isinstance(value, bool | int | float | str)
    }
