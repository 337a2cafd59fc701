"""`diagd align` for world models: fine-tune one on the schedules it will be decoded by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from diagd.calibration.align import AlignOptions, align
from diagd.errors import UsageError
from diagd.schedule import RowSeed, Schedule, StreamLayout
from diagd.world.dataset import cached_tokens
from diagd.world.mixture import Share
from diagd.world.model import load_world, save_world


@dataclass(frozen=True)
class AlignRun:
    """What `diagd align` is asked for.

    Attributes:
        model: folder of the world model.
        data: recording to train on.
        output: folder of the aligned model.
        lags: (k, d) of each schedule; they share what next-token prediction leaves.
        ntp_share: share of the windows trained as next-token prediction; 1 with no lags is the control.
        row_seed: of the schedules.
        windows: distinct windows drawn from the recording.
        steps, batch, rate, rank, seed: see `AlignOptions`.
    """

    model: Path
    data: Path
    output: Path
    lags: tuple[tuple[int, int], ...] = ((1, 9), (1, 20))
    ntp_share: float = 0.4
    row_seed: RowSeed = RowSeed.PREVIOUS_FRAME
    windows: int = 4096
    steps: int = 200
    batch: int = 8
    rate: float = 3e-4
    rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.ntp_share <= 1 or (not self.lags and self.ntp_share < 1):
            raise UsageError(
                f"next-token share {self.ntp_share} with {len(self.lags)} schedules; expected 0 to 1, "
                "and 1 where there is no schedule"
            )

    def shares(self, layout: StreamLayout) -> tuple[Share, ...]:
        """Every schedule with its share of the windows."""
        rest = (1 - self.ntp_share) / max(1, len(self.lags))
        diagonal = [(rest, Schedule(layout, k, d, self.row_seed)) for k, d in self.lags]
        shares = [(self.ntp_share, Schedule.next_token(layout)), *diagonal]
        return tuple(share for share in shares if share[0] > 0)


def run_align(run: AlignRun, report: Callable[[int, float], None] | None = None) -> Path:
    """Fine-tune and write the folder of the aligned model; ``report`` hears step and loss.

    Raises:
        CheckpointError: the model cannot be read.
        UsageError: a recording that cannot be used.
    """
    world = load_world(run.model)
    dataset = cached_tokens(run.data, world.codebook)
    frames = world.description.context_frames
    starts = np.random.default_rng(run.seed).choice(dataset.window_starts(frames), run.windows)
    options = AlignOptions(
        run.shares(world.description.layout), run.steps, run.batch, run.rate, run.rank, run.seed
    )
    model = align(world.model, dataset.windows(starts, frames), options, report)
    recipe = asdict(run) | {name: str(getattr(run, name)) for name in ("model", "data", "output")}
    recipe["row_seed"] = run.row_seed.value
    save_world(run.output, replace(world, model=model), {"aligned": recipe})
    return run.output
