"""How a model is aligned."""

from __future__ import annotations

from collections.abc import Sequence

from diagd.cluster.workers import ClusterOptions
from diagd.engines.backend import CHOICES
from diagd.errors import UsageError
from diagd.options import SEED, File, checked, flag, setting
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import Schedule, StreamLayout


@checked
class AlignOptions:
    """How a model is aligned, to which shares of schedules; they need not add up to 1."""

    shares: tuple[tuple[float, Schedule], ...] = ()
    steps: int = setting("optimiser steps", 200, ge=1)
    batch: int = flag("windows of a step", 8, ge=1)
    rate: float = flag(
        "peak learning rate; it falls linearly to 0 after a warm-up of a twentieth", 3e-4, ge=0
    )
    rank: int = setting(
        "of low-rank updates of every matrix (arXiv 2106.09685); 0 trains all weights", 0, ge=0
    )
    seed: int = setting("of windows, schedules and low-rank factors", 0, **SEED)
    autocast: bool = True
    device: str = flag("cpu, cuda or cuda:N", "cpu")
    resume: File | None = setting(
        "file that training is kept in as it goes, and goes on from where it was interrupted", None
    )
    keep_every: int = setting("steps between two writes of resume", 100, ge=1)


@checked
class PreferTraining(AlignOptions):
    """How low-rank updates are trained on preferences: see ``AlignOptions``."""

    batch: int = setting("pairs of a step", 4, ge=1)
    rate: float = setting(
        "peak learning rate; it falls linearly to 0 after a warm-up of a twentieth", 1e-4, ge=0
    )
    rank: int = setting("of low-rank updates of every matrix", 8, ge=1)


@checked
class PreferOptions:
    """What is rolled out and compared, and what is asked of the result."""

    contexts: int = setting("prefixes, with the actions behind them, that rollouts share", 256, ge=2)
    rollouts: int = setting("of a context; the best is preferred to the worst", 8, ge=2)
    prompt: int = setting("known frames of a context", 2, ge=1)
    frames: int = setting("frames that are rolled out behind them", 4, ge=1)
    strength: float = setting("beta of DPO, on mean log-likelihoods of a token", 10.0, gt=0)
    anchor: float = setting("share of the best rollouts' own likelihood in the loss", 0.2, ge=0)
    judged: int = setting("held-out contexts that the gate looks at", 64, ge=8)
    probe_steps: int = setting("optimiser steps of each probe of the actions", 600, ge=1)
    backend: str = setting(f"that rolls out: {CHOICES}", "cpu")
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
