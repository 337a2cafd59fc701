"""How a model is aligned."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from diagd.errors import UsageError
from diagd.options import FLAG, OPTIONS, File
from diagd.schedule import Schedule


@dataclass(frozen=True, config=OPTIONS)
class AlignOptions:
    """How a model is aligned.

    Attributes:
        shares: schedules, each with its share of the windows; the shares need not add up to 1.
        autocast: compute in bfloat16.
    """

    shares: tuple[tuple[float, Schedule], ...] = ()
    steps: int = Field(default=200, ge=1, description="optimiser steps")
    batch: Annotated[int, FLAG] = Field(default=8, ge=1, description="windows of a step")
    rate: Annotated[float, FLAG] = Field(
        default=3e-4, description="peak learning rate; it falls linearly to 0 after a warm-up of a twentieth"
    )
    rank: int = Field(
        default=0,
        ge=0,
        description="of low-rank updates of every matrix (arXiv 2106.09685); 0 trains all weights",
    )
    seed: int = Field(default=0, description="of windows, schedules and low-rank factors")
    autocast: bool = True
    device: Annotated[str, FLAG] = Field(default="cpu", description="cpu, cuda or cuda:N")
    resume: File | None = Field(
        default=None,
        description="file that training is kept in as it goes, and goes on from where it was interrupted",
    )
    keep_every: int = Field(default=100, ge=1, description="steps between two writes of resume")

    def __post_init__(self) -> None:
        if not self.rate >= 0:
            raise UsageError(f"learning rate {self.rate}: expected 0 or more, such as 3e-4")


def check_device(device: str) -> None:
    """Check that PyTorch can train on a device such as ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        UsageError: it is none, or this machine has no such GPU.
    """
    import torch

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device '{device}': expected cpu, cuda or cuda:N") from error
    gpus = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= gpus:
        raise UsageError(f"device '{device}': PyTorch sees {gpus} GPUs here; train on cpu")
