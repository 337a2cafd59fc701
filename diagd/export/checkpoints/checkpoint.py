"""A checkpoint: named tensor handles, where they come from and what else the file says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from diagd.errors import CheckpointError
from diagd.export.checkpoints.tensors import TensorHandle


class Checkpoint(Mapping[str, TensorHandle]):
    """Tensor handles by name, in the order of the file.

    Attributes:
        source: path or ``hf://`` address.
        metadata: what the file says besides tensors, as plain data (see each reader).
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorHandle],
        *,
        source: str,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self.source = source
        self.metadata = dict(metadata or {})

    def __getitem__(self, name: str) -> TensorHandle:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<Checkpoint of {len(self)} tensors from {self.source}>"


def select(checkpoint: Checkpoint, rename: Callable[[str], str | None]) -> Checkpoint:
    """A view of a checkpoint under other names; nothing is read.

    Args:
        checkpoint: tensors to choose from.
        rename: new name of a tensor, or None to leave it out.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    origin: dict[str, str] = {}
    for name in checkpoint:
        new = rename(name)
        if new is None:
            continue
        if new in origin:
            raise CheckpointError(
                f"{checkpoint.source} holds '{origin[new]}' and '{name}', which both mean '{new}'; "
                "use a checkpoint of a single model"
            )
        origin[new] = name
    tensors = {new: checkpoint[name] for new, name in origin.items()}
    return Checkpoint(tensors, source=checkpoint.source, metadata=checkpoint.metadata)
