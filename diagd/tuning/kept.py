"""A training that is kept on the disk as it goes, so that it can be interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from diagd.bundle.files import atomic_file
from diagd.errors import UsageError
from diagd.tuning.options import AlignOptions


@dataclass(frozen=True)
class Kept:
    """What is trained and its optimiser, and the file that they are kept in; None: they are not.

    What a step draws depends on its number alone, so a training that was resumed gives the same weights.

    Attributes:
        every, last: steps between two writes of the file, and all steps.
        identity: of the training: its options and data.
        writes: whether this process does, of several that read the file.
    """

    path: Path | None
    every: int
    last: int
    identity: str
    trained: Sequence[nn.Parameter]
    optimiser: torch.optim.Optimizer
    writes: bool

    @classmethod
    def of(
        cls,
        options: AlignOptions,
        data: Sequence[NDArray[np.generic]],
        trained: Sequence[nn.Parameter],
        optimiser: torch.optim.Optimizer,
        writes: bool,
    ) -> Kept:
        """Of a training with its options, and what it is trained on."""
        shape = [tuple(parameter.shape) for parameter in trained]
        told = repr((replace(options, device="", resume=None, keep_every=1), shape))
        digest = hashlib.sha256(told.encode())
        for array in data:
            digest.update(np.ascontiguousarray(array).tobytes())
        identity = digest.hexdigest()
        return cls(options.resume, options.keep_every, options.steps, identity, trained, optimiser, writes)

    def resumed(self) -> int:
        """Be as when the file was written; gives the steps that were done.

        Raises:
            UsageError: it is no such file, or of another training.
        """
        if self.path is None or not self.path.exists():
            return 0
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            identity, step = state["identity"], int(state["step"])
        except Exception as error:  # PyTorch raises many types for bytes that are something else
            raise UsageError(f"{self.path} is no training that was kept: {error}; remove it") from error
        if identity != self.identity:
            raise UsageError(
                f"{self.path} is of a training with other options or data; repeat its command, or remove it"
            )
        with torch.no_grad():
            for parameter, value in zip(self.trained, state["trained"], strict=True):
                parameter.copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])
        return step

    def keep(self, step: int) -> None:
        """Write the file, once in so many steps and at the last."""
        if self.path is None or not self.writes or (step % self.every and step != self.last):
            return
        state = {
            "identity": self.identity,
            "step": step,
            "trained": [parameter.detach().cpu() for parameter in self.trained],
            "optimiser": self.optimiser.state_dict(),
        }
        with atomic_file(self.path) as partial:
            torch.save(state, partial)

    def remove(self) -> None:
        """The training is done."""
        if self.path is not None and self.writes:
            self.path.unlink(missing_ok=True)
