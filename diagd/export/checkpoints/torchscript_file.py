"""Parameters and buffers of a TorchScript archive, whose pickle is a tree of module attributes."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from diagd.errors import CheckpointError
from diagd.export.checkpoints.restricted_pickle import Opaque, StoredTensor

_MODULE_LIMIT = 10_000


def module_tensors(root: object, path: Path) -> dict[str, StoredTensor]:
    """Tensors of an unpickled TorchScript module by their state-dict names.

    The archive's code is not looked at. Buffers that were not persistent are included: TorchScript stores
    them as attributes like any other.

    Raises:
        CheckpointError: its modules contain each other.
    """
    tensors: dict[str, StoredTensor] = {}
    pending = deque([("", root)])
    visited = 0
    while pending:
        prefix, module = pending.popleft()
        visited += 1
        if visited > _MODULE_LIMIT:
            raise CheckpointError(
                f"{path} holds more than {_MODULE_LIMIT} modules: it is damaged; download it again"
            )
        attributes = module.state if isinstance(module, Opaque) else None
        for name, value in attributes.items() if isinstance(attributes, dict) else ():
            if isinstance(value, StoredTensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, Opaque):
                pending.append((f"{prefix}{name}.", value))
    return tensors
