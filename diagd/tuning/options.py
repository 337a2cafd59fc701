"""How a model is aligned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from diagd.cluster.connection import ClusterOptions
from diagd.engines.backend import CHOICES
from diagd.errors import UsageError
from diagd.options import FLAG, OPTIONS, File
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import Schedule, StreamLayout


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


@dataclass(frozen=True, config=OPTIONS)
class PreferTraining(AlignOptions):
    """How low-rank updates are trained on preferences: see ``AlignOptions``."""

    batch: int = Field(default=4, ge=1, description="pairs of a step")
    rate: float = Field(
        default=1e-4, description="peak learning rate; it falls linearly to 0 after a warm-up of a twentieth"
    )
    rank: int = Field(default=8, ge=1, description="of low-rank updates of every matrix")


@dataclass(frozen=True, config=OPTIONS)
class PreferOptions:
    """What is rolled out and compared, and what is asked of the result.

    Attributes:
        sampling: of the rollouts.
    """

    contexts: int = Field(
        default=256, ge=2, description="prefixes, with the actions behind them, that rollouts share"
    )
    rollouts: int = Field(default=8, ge=2, description="of a context; the best is preferred to the worst")
    prompt: int = Field(default=2, ge=1, description="known frames of a context")
    frames: int = Field(default=4, ge=1, description="frames that are rolled out behind them")
    strength: float = Field(default=10.0, gt=0, description="beta of DPO, on mean log-likelihoods of a token")
    anchor: float = Field(
        default=0.2, ge=0, description="share of the best rollouts' own likelihood in the loss"
    )
    judged: int = Field(default=64, ge=8, description="held-out contexts that the gate looks at")
    probe_steps: int = Field(default=600, ge=1, description="optimiser steps of each probe of the actions")
    backend: str = Field(default="cpu", description=f"that rolls out: {CHOICES}")
    sampling: SamplingSettings = SamplingSettings(1.0, 0, 0.95)
    who: ClusterOptions = ClusterOptions()


def mixture(orders: Sequence[str], raster: float, layout: StreamLayout) -> tuple[tuple[float, Schedule], ...]:
    """Orders of decoding beside next-token prediction, each with its share of the windows.

    Raises:
        ScheduleError: an order that cannot be.
    """
    if raster == 1:
        return ((1.0, Schedule.next_token(layout)),)
    schedules = [Schedule.parse(order, layout) for order in orders]
    next_token = ((raster, Schedule.next_token(layout)),) if raster else ()
    return (*next_token, *(((1 - raster) / len(schedules), schedule) for schedule in schedules))


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
