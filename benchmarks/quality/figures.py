"""Everything on the quality page, as it is kept in docs/quality.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.quality.decoders import DecoderFigures
from diagd.schedule import RowSeed
from diagd.tuning.prefer import PreferReport
from worlds.evaluate import Drift, Scores
from worlds.metrics import Estimate
from worlds.options import EvalOptions

SEEDS = (RowSeed.PREVIOUS_FRAME, RowSeed.ABOVE, RowSeed.DUPLICATE, RowSeed.PROMPT)


@dataclass(frozen=True)
class GapRow:
    """Likelihood gap to next-token prediction of one schedule under every row seed, and without refeeding."""

    name: str
    passes: int
    gaps: dict[str, Estimate]
    without_refeed: Estimate


@dataclass(frozen=True)
class SizeFigures:
    """A model: every row seed, rollouts by schedule, and of one of each world the drift of long rollouts."""

    gaps: list[GapRow]
    schedules: list[Scores]
    drift: Drift | None = None


@dataclass(frozen=True)
class CompatRow:
    """Gap to next-token prediction of one schedule as a strict step and as the released code decodes it.

    Attributes:
        name: of the schedule.
        aligned: row seed and refeeding that the model was trained with.
        strict: row seed and refeeding of the released code; seeds are hidden after their step.
        released: the same with the seeds kept and unwritten slots seen as zero rows.
    """

    name: str
    aligned: Estimate
    strict: Estimate
    released: Estimate


@dataclass(frozen=True)
class TrainingRow:
    """A way of training: NLL under next-token prediction, the gap of each schedule to it, and rollouts."""

    name: str
    nll: Estimate
    gaps: dict[str, Estimate]
    schedules: list[Scores] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """Everything on the page; a part that was not measured is empty.

    Of sizes are ``compat`` (strict steps against the released code), ``sizes``, ``frames_per_second`` and
    ``parameters``; of worlds ``training`` (the same size trained otherwise), ``decoders``, ``worlds`` and
    ``preferences`` (what `diagd prefer` reported).
    """

    options: EvalOptions
    shipped: SizeFigures | None = None
    compat: dict[str, list[CompatRow]] = field(default_factory=dict)
    sizes: dict[str, SizeFigures] = field(default_factory=dict)
    training: dict[str, list[TrainingRow]] = field(default_factory=dict)
    frames_per_second: dict[str, dict[str, float]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    decoders: dict[str, DecoderFigures] = field(default_factory=dict)
    worlds: dict[str, SizeFigures] = field(default_factory=dict)
    preferences: dict[str, PreferReport] = field(default_factory=dict)
