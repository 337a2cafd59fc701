"""Scores a world model under decoding schedules, all on the same windows with the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Int
from diagd.schedule import Schedule
from diagd.tuning.recordings import TokenDataset
from diagd.tuning.reward import Probe, Transitions
from diagd.tuning.rollouts import Streams, parts
from worlds.geometry import Geometry
from worlds.metrics import Estimate, frechet_distance, principal_axes, psnr, ssim, tile_features
from worlds.model import Rollouts, WorldModel
from worlds.options import EvalOptions

SETTLED = 3
"""Frame of a window from which likelihood is reported apart: earlier ones show more that nobody can know."""


@dataclass(frozen=True)
class GeometryScores:
    """What the geometry of the world says of rollouts.

    Attributes:
        followed: share of transitions that obey their action.
        walks_followed: the same among actions that scroll the view.
        agreement: share of scrolled tiles that stayed what they were.
        invalid: share of cells that true frames never show there.
    """

    followed: Estimate
    walks_followed: Estimate
    agreement: Estimate
    invalid: Estimate


@dataclass(frozen=True)
class TruthScores:
    """Rollouts against the true continuation.

    Attributes:
        match, psnr, ssim: by generated frame, against the true tokens and the frames they decode to.
        frechet: squared distance of tile statistics to those of the true frames.
        dynamics: cells that change from frame to frame, for each that does in the true frames: 1 is as
            lively as the truth, less is freezing. None where reports are older than this figure.
    """

    match: list[Estimate]
    psnr: list[Estimate]
    ssim: list[Estimate]
    frechet: Estimate
    dynamics: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Figures of rollouts; likelihoods in nats per token.

    Attributes:
        generated_nll: of generated tokens under next-token prediction.
        geometry: of the rollouts; None where the world's geometry is not known.
        truth: of the rollouts.
        ntp_match: share of generated tokens that next-token prediction draws there too, with the same random
            numbers. None where reports are older than this figure.
        recovered: share of generated transitions off which a probe reads their action. None without a probe.
    """

    generated_nll: Estimate
    geometry: GeometryScores | None
    truth: TruthScores
    ntp_match: Estimate | None = None
    recovered: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Scores(Judgement):
    """Figures of one schedule, those of its rollouts included.

    Attributes:
        name, k, d, row_seed, refeed: the schedule.
        passes: forward passes for the generated frames of a rollout.
        nll: teacher-forced, all scored frames.
        nll_settled: teacher-forced, frames from `SETTLED` on.
        nll_gap: difference to next-token prediction, paired by window.
    """

    name: str
    k: int
    d: int
    row_seed: str
    refeed: bool
    passes: int
    nll: Estimate
    nll_settled: Estimate
    nll_gap: Estimate


class Evaluation:
    """True windows, their geometry and the likelihood of next-token prediction, shared by all schedules.

    ``recording``: true episodes that the model was not trained on. What the ``geometry`` of the world and a
    ``probe`` that reads actions would say is left out where there are none.
    """

    def __init__(
        self,
        model: WorldModel,
        recording: TokenDataset,
        geometry: Geometry | None,
        options: EvalOptions,
        probe: Probe | None = None,
    ) -> None:
        self.model, self.geometry, self.options, self.probe = model, geometry, options, probe
        random = np.random.default_rng(options.seed)
        self.windows = _pick(recording, options.windows, options.window_frames, random)
        self.truth = _pick(recording, options.rollouts, options.prompt + options.frames, random)
        self._rolled: dict[Schedule, Streams] = {}
        self.baseline = model.nll(self.windows, Schedule.next_token(model.layout))
        self._axes = principal_axes(parts(recording.streams.astype(np.int64), model.layout)[0], model.codes)

    def score(self, name: str, schedule: Schedule) -> tuple[Scores, Streams]:
        """Measure one schedule; also returns the rollouts, int64 [B, N]."""
        options, model = self.options, self.model
        nll = model.nll(self.windows, schedule)
        rolled = self.rollouts([schedule])[0]
        scores = Scores(
            name=name,
            k=schedule.k,
            d=schedule.d,
            row_seed=schedule.row_seed.value,
            refeed=schedule.refeed,
            passes=schedule.total_steps(options.frames),
            nll=Estimate.of(_row_means(nll)),
            nll_settled=Estimate.of(_row_means(nll[:, SETTLED * model.layout.frame_length :])),
            nll_gap=Estimate.of(_row_means(nll - self.baseline)),
            **vars(self.judge(rolled)),
        )
        return scores, rolled

    def judge(self, rolled: Streams) -> Judgement:
        """Judge rollouts [B, N], however they were decoded."""
        layout = self.model.layout
        likelihood = self.model.nll(rolled, Schedule.next_token(layout))
        generated = slice(self.options.prompt * layout.frame_length, None)
        return Judgement(
            generated_nll=Estimate.of(_row_means(likelihood[:, generated])),
            geometry=self.geometry_scores(rolled),
            truth=self._compare(rolled),
            ntp_match=Estimate.of(self._match(rolled, self.rollouts([Schedule.next_token(layout)])[0])),
            recovered=self.recovered(rolled),
        )

    def recovered(self, rolled: Streams) -> Estimate | None:
        """Share of transitions behind the prompt of rollouts [B, N] whose action the probe reads off them."""
        if self.probe is None:
            return None
        _, right = self.probe.read(Transitions.of(rolled, self.model.layout, self.options.prompt))
        return Estimate.of(right.reshape(len(rolled), -1).mean(1))

    def rollouts(self, schedules: Sequence[Schedule]) -> list[Streams]:
        """Rollouts [B, N] by some orders, each made once; those that are asked for together share prompts."""
        options, new = self.options, [order for order in schedules if order not in self._rolled]
        if new:
            asked = Rollouts(self.truth, options.prompt, new, options.sampling, options.seed)
            made = self.model.roll_out(asked)
            self._rolled |= zip(new, made, strict=True)
        return [self._rolled[order] for order in schedules]

    def gap(self, schedule: Schedule) -> Estimate:
        """Teacher-forced likelihood gap to next-token prediction, paired by window, nats per token."""
        nll = self.model.nll(self.windows, schedule)
        return Estimate.of(_row_means(nll - self.baseline))

    @property
    def liveliness(self) -> float:
        """Share of cells that change from frame to frame of true windows."""
        return float(self.changes(self.windows).mean())

    def changes(self, streams: Streams) -> NDArray[np.float64]:
        """Likewise of each of some streams, [B]."""
        return _changes(parts(streams, self.model.layout)[0])

    def geometry_scores(self, rolled: Streams) -> GeometryScores | None:
        """Scores of rollouts [B, N] by the geometry of their world, where that is known."""
        if self.geometry is None:
            return None
        layout, prompt, count = self.model.layout, self.options.prompt, len(rolled)
        cells, _ = parts(rolled, layout)
        actions = rolled.reshape(count, -1, layout.frame_length)[:, prompt:, 0] - self.model.codes
        before, after = cells[:, prompt - 1 : -1], cells[:, prompt:]
        shape = (-1, layout.rows, layout.columns)
        verdict = self.geometry.follows(before.reshape(shape), after.reshape(shape), actions.ravel())
        followed = np.where(verdict.counts, verdict.followed, np.nan)
        walks = np.where(verdict.walks, followed, np.nan)
        invalid = self.geometry.invalid(after).mean((-2, -1))
        samples = (followed, walks, verdict.agreement, invalid)
        return GeometryScores(*(Estimate.of(_row_means(values.reshape(count, -1))) for values in samples))

    def _match(self, rolled: Streams, other: Streams) -> NDArray[np.float64]:
        """Share of generated cells that two sets of rollouts have in common, [B]."""
        layout, frames = self.model.layout, self.options.frames
        cells = (parts(streams, layout)[0][:, -frames:] for streams in (rolled, other))
        shares: NDArray[np.float64] = np.equal(*cells).mean((1, 2, 3))
        return shares

    def _compare(self, rolled: Streams) -> TruthScores:
        layout, frames = self.model.layout, self.options.frames
        clips = [parts(streams, layout)[0][:, -frames - 1 :] for streams in (rolled, self.truth)]
        got, true = (clip[:, 1:] for clip in clips)
        match, ratio, similarity = [], [], []
        for n in range(frames):
            images, answers = self.model.pixels(got[:, n]), self.model.pixels(true[:, n])
            match.append(Estimate.of((got[:, n] == true[:, n]).mean((1, 2))))
            ratio.append(Estimate.of(psnr(images, answers)))
            similarity.append(Estimate.of(ssim(images, answers)))
        return TruthScores(
            match, ratio, similarity, self._frechet(got, true), Estimate.ratio(*map(_changes, clips))
        )

    def _frechet(self, got: Int, true: Int, resamples: int = 20) -> Estimate:
        """Distance, with a bootstrap over rollouts for its standard error."""
        sets = [
            tile_features(cells.reshape(-1, *cells.shape[2:]), self.model.codes, self._axes)
            for cells in (got, true)
        ]
        first, second = (features.reshape(len(got), -1, features.shape[1]) for features in sets)
        if first.shape[0] * first.shape[1] <= first.shape[2]:
            return Estimate(float("nan"), float("nan"), len(got))
        random = np.random.default_rng(self.options.seed)
        draws = []
        for _ in range(resamples):
            picked = random.integers(len(got), size=len(got))
            draws.append(frechet_distance(np.concatenate(first[picked]), np.concatenate(second[picked])))
        mean = frechet_distance(np.concatenate(first), np.concatenate(second))
        return Estimate(mean, float(np.std(draws, ddof=1)), len(got))


@dataclass(frozen=True)
class Drift:
    """Quality of long rollouts by frame index.

    Attributes:
        frames: index of the last frame of each stretch.
        scores: over each stretch; none where the geometry of the world is not known.
        recovered: likewise, see ``Scores``; none without a probe.
        dynamics: share of cells that change from frame to frame, for each that does in true frames.
    """

    frames: list[int]
    scores: list[GeometryScores]
    recovered: list[Estimate] = field(default_factory=list)
    dynamics: list[Estimate] = field(default_factory=list)


def measure_drift(
    evaluation: Evaluation, schedule: Schedule, actions: NDArray[np.int64], stretches: int = 10
) -> Drift:
    """Roll out ``actions`` int64 [B, F] behind true prompts and score the frames stretch by stretch."""
    model, options = evaluation.model, evaluation.options
    layout, prompt, (count, frames) = model.layout, options.prompt, actions.shape
    streams = np.zeros((count, prompt + frames, layout.frame_length), np.int64)
    known = evaluation.truth[:count].reshape(count, -1, layout.frame_length)
    streams[:, :prompt] = known[:, :prompt]
    streams[:, prompt:, 0] = model.codes + actions
    streams = streams.reshape(count, -1)
    (rolled,) = model.roll_out(Rollouts(streams, prompt, [schedule], options.sampling, options.seed))
    drift, liveliness = Drift([], []), evaluation.liveliness
    ends = np.linspace(prompt, prompt + frames, stretches + 1).astype(int)
    for start, end in pairwise(ends.tolist()):
        span = slice((start - prompt) * layout.frame_length, end * layout.frame_length)
        part = rolled[:, span]
        drift.frames.append(end)
        if (scores := evaluation.geometry_scores(part)) is not None:
            drift.scores.append(scores)
        if (recovered := evaluation.recovered(part)) is not None:
            drift.recovered.append(recovered)
        drift.dynamics.append(Estimate.of(evaluation.changes(part) / liveliness))
    return drift


def _changes(clips: Int) -> NDArray[np.float64]:
    """Share of cells of clips [B, T, h, w] that differ from the frame before, [B]."""
    shares: NDArray[np.float64] = (clips[:, 1:] != clips[:, :-1]).mean((1, 2, 3))
    return shares


def _row_means(samples: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean of each row, leaving NaN out; NaN where a row has nothing else."""
    valid = ~np.isnan(samples)
    total = np.where(valid, samples, 0).sum(1)
    return np.where(valid.any(1), total / np.maximum(valid.sum(1), 1), np.nan)


def _pick(recording: TokenDataset, count: int, frames: int, random: np.random.Generator) -> Streams:
    starts = recording.window_starts(frames)
    return recording.windows(random.choice(starts, count, replace=len(starts) < count), frames)
