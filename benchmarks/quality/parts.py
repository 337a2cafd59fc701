"""What the quality study measures: one function a part."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diagd.export.families.world import load_world
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import RowSeed, Schedule, StreamLayout
from worlds.bundle_subject import BundleSubject
from worlds.evaluate import Drift, Evaluation, Scores, measure_drift
from worlds.metrics import Estimate
from worlds.report import save_contact_sheet
from worlds.run_eval import pictures, schedule_name, walk_actions

ROW_LAGS = (1, 2, 4)
SEEDS = (RowSeed.PREVIOUS_FRAME, RowSeed.ABOVE, RowSeed.DUPLICATE, RowSeed.PROMPT)

Report = Callable[[str], None]


@dataclass(frozen=True)
class GapRow:
    """Likelihood gap to next-token prediction of one schedule under every row seed, and without refeeding."""

    name: str
    passes: int
    gaps: dict[str, Estimate]
    without_refeed: Estimate


@dataclass(frozen=True)
class ShippedFigures:
    """The shipped model: every row seed, rollouts by schedule, drift of long rollouts."""

    gaps: list[GapRow]
    schedules: list[Scores]
    drift: Drift


@dataclass(frozen=True)
class SizeFigures:
    """Another size: every row seed, rollouts by schedule."""

    gaps: list[GapRow]
    schedules: list[Scores]


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
    """A way of training: NLL under next-token prediction, and the gap of each schedule to it."""

    name: str
    nll: Estimate
    gaps: dict[str, Estimate]


def diagonal_schedules(layout: StreamLayout) -> list[Schedule]:
    """Serial and chained frames for every row lag of the study."""
    return [named(layout, k) for k in ROW_LAGS for named in (Schedule.serial, Schedule.chained)]


def shipped_figures(
    evaluation: Evaluation, long_frames: int, long_rollouts: int, contact: Path, report: Report
) -> ShippedFigures:
    """Measure the shipped model and draw its contact sheet."""
    layout = evaluation.subject.layout
    gaps = [_gap_row(evaluation, schedule, report) for schedule in diagonal_schedules(layout)]
    scores, sheet = [], {"truth": pictures(evaluation.subject, evaluation.truth[:1])[0]}
    for schedule in [Schedule.next_token(layout), *diagonal_schedules(layout)]:
        name = schedule_name(schedule)
        report(f"rollouts of {name}")
        score, rolled = evaluation.score(name, schedule)
        scores.append(score)
        sheet[name] = pictures(evaluation.subject, rolled[:1])[0]
    save_contact_sheet(contact, sheet)
    report(f"{long_frames} frames of k=1 chained")
    actions = walk_actions(long_rollouts, long_frames, evaluation.options.seed)
    return ShippedFigures(gaps, scores, measure_drift(evaluation, Schedule.chained(layout, 1), actions))


def _gap_row(evaluation: Evaluation, schedule: Schedule, report: Report) -> GapRow:
    name = schedule_name(schedule)
    report(f"likelihood of {name}")
    gaps = {seed.value: evaluation.gap(replace(schedule, row_seed=seed)) for seed in SEEDS}
    without = evaluation.gap(replace(schedule, refeed=False))
    return GapRow(name, schedule.total_steps(evaluation.options.frames), gaps, without)


def size_figures(evaluation: Evaluation, name: str, report: Report) -> SizeFigures:
    """Every metric of one size under next-token prediction and each diagonal schedule."""
    layout = evaluation.subject.layout
    gaps = [_gap_row(evaluation, schedule, report) for schedule in diagonal_schedules(layout)]
    scores = []
    for schedule in [Schedule.next_token(layout), *diagonal_schedules(layout)]:
        report(f"{name}: {schedule_name(schedule)}")
        scores.append(evaluation.score(schedule_name(schedule), schedule)[0])
    return SizeFigures(gaps, scores)


def compat_figures(bundle: Path, evaluation: Evaluation, windows: int, report: Report) -> list[CompatRow]:
    """Strict and released decoding on the engine, on the first windows of the evaluation."""
    strict, released = BundleSubject(str(bundle)), BundleSubject(str(bundle), compat="mineworld")
    streams = evaluation.windows[:windows]
    report("strict against compat: NTP")
    baseline = strict.nll(streams, Schedule.next_token(strict.layout))

    def gap(subject: BundleSubject, schedule: Schedule) -> Estimate:
        return Estimate.of(np.nanmean(subject.nll(streams, schedule) - baseline, axis=1))

    rows = []
    for schedule in diagonal_schedules(strict.layout):
        report(f"strict against compat: {schedule_name(schedule)}")
        bare = replace(schedule, row_seed=RowSeed.DUPLICATE, refeed=False)
        figures = (gap(strict, schedule), gap(strict, bare), gap(released, replace(bare, keep_seeds=True)))
        rows.append(CompatRow(schedule_name(schedule), *figures))
    return rows


def training_row(evaluation: Evaluation, name: str, report: Report) -> TrainingRow:
    """Likelihood of one way of training under every schedule."""
    report(f"likelihood of '{name}'")
    schedules = diagonal_schedules(evaluation.subject.layout)
    gaps = {schedule_name(schedule): evaluation.gap(schedule) for schedule in schedules}
    return TrainingRow(name, Estimate.of(np.nanmean(evaluation.baseline, axis=1)), gaps)


def speeds(
    bundles: Mapping[str, Path], rounds: int, frames: int, report: Report
) -> dict[str, dict[str, float]]:
    """Frames per second of each bundle's engine by schedule, pixels not included.

    The bundles take turns, and the median of the rounds counts.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in bundles}
    subjects = {name: BundleSubject(str(path)) for name, path in bundles.items()}
    for turn in range(rounds + 1):  # the first one warms up
        for name, subject in subjects.items():
            report(f"speed of {name}, round {turn} of {rounds}")
            schedules = [Schedule.next_token(subject.layout), *diagonal_schedules(subject.layout)]
            for schedule in schedules:
                rate = _frames_per_second(subject, schedule, frames)
                samples[name].setdefault(schedule_name(schedule), []).append(rate)
    return {
        name: {schedule: float(np.median(rates[1:])) for schedule, rates in found.items()}
        for name, found in samples.items()
    }


def _frames_per_second(subject: BundleSubject, schedule: Schedule, frames: int) -> float:
    layout = subject.layout
    stream = np.zeros((1, (1 + frames) * layout.frame_length), np.int64)
    stream[:, :: layout.frame_length] = subject.codes
    began = time.perf_counter()
    subject.roll_out(stream, 1, schedule, SamplingSettings(1.0, 0, 0.95), 0)
    return frames / (time.perf_counter() - began)


def export_world(folder: Path, output: Path) -> Path:
    """The bundle of a trained world."""
    from diagd.export.exporter import GraphOptions, export, open_sources
    from diagd.export.families.registry import find

    family = find("world", str(folder))
    return export(family, GraphOptions(), open_sources(family, None, None), output).path


def parameters(folder: Path) -> int:
    """Weights of a trained world."""
    return sum(parameter.numel() for parameter in load_world(folder).model.parameters())
