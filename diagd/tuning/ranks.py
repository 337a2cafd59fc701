"""Processes that train one model together, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from diagd.errors import UsageError
from diagd.progress import started
from diagd.tuning.teacher_forcing import ForcedBatch, ForcedPasses

_PATIENCE: Final = timedelta(days=1)
"""Others wait for the first one while it fits a tokenizer."""


@dataclass(frozen=True)
class Ranks:
    """Which of several processes this one is; they see the same batches that one alone would.

    ``rank`` counts from 0 up to ``size``; ``device`` is that of this one.
    """

    rank: int
    size: int
    device: str

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model, which has the gradients of all of them where it is run by this."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def share(self, windows: int) -> slice:
        """Its part of the windows of a step.

        Raises:
            UsageError: there are fewer windows than ranks.
        """
        if windows < self.size:
            raise UsageError(f"{windows} windows of a step for {self.size} processes; raise --batch")
        return slice(self.rank, None, self.size)

    def batch(
        self, passes: ForcedPasses, windows: NDArray[np.int64], choice: NDArray[np.int64]
    ) -> tuple[ForcedBatch, float]:
        """Its windows of a batch int64 [B, N], each by its schedule [B], and what their loss counts for.

        The mean over ranks of weighted losses is the mean over all tokens, however many each rank scores.

        Raises:
            UsageError: there are fewer windows than ranks.
        """
        mine, scored = self.share(len(windows)), passes.scored[choice]
        weight = self.size * float(scored[mine].sum() / scored.sum())
        return passes.batch(windows[mine], choice[mine].tolist()).to(self.device), weight

    def mean(self, loss: Tensor) -> float:
        """The mean of a value over all."""
        if self.size == 1:
            return loss.item()
        total = loss.detach().clone()
        distributed.all_reduce(total)
        return total.item() / self.size

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def together(device: str, meeting: str | None = None) -> Iterator[Ranks]:
    """Be one of the processes that torchrun started, or stand alone; ``cuda`` is a GPU for each.

    Within another of its kind it goes on with that one: processes that part may miss each other next time.
    ``meeting`` is where they find each other, which torchrun tells.
    """
    if started() == 1:
        yield Ranks(0, 1, device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend, rank = "nccl" if device.startswith("cuda") else "gloo", int(os.environ["RANK"])
    if distributed.is_initialized():
        yield Ranks(rank, started(), device)
        return
    distributed.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=started(), timeout=_PATIENCE
    )
    try:
        yield Ranks(rank, started(), device)
    finally:
        distributed.destroy_process_group()
