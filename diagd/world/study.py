"""The quality of Diagonal Decoding on a world model, measured and written as docs/quality.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diagd.bundle.files import atomic_file
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import RowSeed, Schedule, StreamLayout
from diagd.world.bundle_subject import BundleSubject
from diagd.world.contact_sheet import save_contact_sheet, save_plot
from diagd.world.dataset import cached_tokens
from diagd.world.evaluate import EvalOptions, Evaluation, Scores, measure_drift
from diagd.world.geometry import Geometry
from diagd.world.model import load_codebook
from diagd.world.quality_page import SEEDS, GapRow, quality_page
from diagd.world.run_eval import open_subject, pictures, schedule_name, walk_actions

ROW_LAGS = (1, 2, 4)

Report = Callable[[str], None]


@dataclass(frozen=True)
class StudyOptions:
    """What the study covers.

    Attributes:
        model: folder of the world model.
        bundle: its bundle, for frames per second; None leaves speed out.
        data: recording that the model was not trained on.
        geometry: recording that the rules of the world are learned from.
        output: folder of quality.md and its pictures.
        evaluation: sizes and sampling.
        long_frames, long_rollouts: of the drift measurement.
        threads: of the engine.
    """

    model: Path
    bundle: Path | None
    data: Path
    geometry: Path
    output: Path
    evaluation: EvalOptions = field(default_factory=lambda: EvalOptions(windows=128, rollouts=96))
    long_frames: int = 500
    long_rollouts: int = 8
    threads: int = 2


def run_study(options: StudyOptions, report: Report = lambda _: None) -> Path:
    """Measure everything and write quality.md, quality.json and the pictures; returns the page."""
    codebook = load_codebook(options.model)
    geometry = Geometry.learn(cached_tokens(options.geometry, codebook), len(codebook))
    subject = open_subject(options.model)
    recording = cached_tokens(options.data, codebook)
    evaluation = Evaluation(subject, recording, geometry, options.evaluation)
    lags = diagonal_lags(subject.layout)
    gaps = [_gap_row(evaluation, k, d, report) for k, d in lags]
    scores, sheet = _rollouts(evaluation, lags, report)
    drift = _drift(evaluation, options, report)
    speeds = _speeds(options, [_schedule(subject.layout, k, d) for k, d in lags], report)
    figures = {
        "options": asdict(options.evaluation),
        "gaps": [asdict(row) for row in gaps],
        "schedules": [asdict(s) for s in scores],
        "drift": drift,
        "frames_per_second": speeds,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    save_contact_sheet(options.output / "quality-contact.png", sheet)
    _plot(options.output / "quality-speed.png", scores, speeds)
    for name, text in (
        ("quality.json", json.dumps(figures, indent=1) + "\n"),
        ("quality.md", quality_page(gaps, scores, drift, speeds, options.evaluation)),
    ):
        with atomic_file(options.output / name) as partial:
            partial.write_text(text)
    return options.output / "quality.md"


def diagonal_lags(layout: StreamLayout) -> list[tuple[int, int]]:
    """(k, d) of the study: serial and chained frames for every row lag."""
    pairs = [(Schedule.serial(layout, k).d, Schedule.chained(layout, k).d, k) for k in ROW_LAGS]
    return [(k, d) for serial, chained, k in pairs for d in (serial, chained)]


def _schedule(layout: StreamLayout, k: int, d: int, seed: RowSeed = RowSeed.PREVIOUS_FRAME) -> Schedule:
    return Schedule(layout, k, d, seed)


def _gap_row(evaluation: Evaluation, k: int, d: int, report: Report) -> GapRow:
    plain = _schedule(evaluation.subject.layout, k, d)
    name = schedule_name(plain)
    report(f"likelihood of {name}")
    gaps = {seed.value: evaluation.gap(replace(plain, row_seed=seed)) for seed in SEEDS}
    without = evaluation.gap(replace(plain, refeed=False))
    return GapRow(name, plain.total_steps(evaluation.options.frames), gaps, without)


def _rollouts(
    evaluation: Evaluation, lags: list[tuple[int, int]], report: Report
) -> tuple[list[Scores], dict[str, Any]]:
    layout = evaluation.subject.layout
    sheet = {"truth": pictures(evaluation.subject, evaluation.truth[:1])[0]}
    scores = []
    for schedule in [Schedule.next_token(layout), *(_schedule(layout, k, d) for k, d in lags)]:
        name = schedule_name(schedule)
        report(f"rollouts of {name}")
        score, rolled = evaluation.score(name, schedule)
        scores.append(score)
        sheet[name] = pictures(evaluation.subject, rolled[:1])[0]
    return scores, sheet


def _drift(evaluation: Evaluation, options: StudyOptions, report: Report) -> dict[str, Any]:
    if not options.long_frames:
        return {}
    schedule = Schedule.chained(evaluation.subject.layout, 1)
    report(f"{options.long_frames} frames of {schedule_name(schedule)}")
    actions = walk_actions(options.long_rollouts, options.long_frames, options.evaluation.seed)
    return asdict(measure_drift(evaluation, schedule, actions))


def _speeds(options: StudyOptions, schedules: list[Schedule], report: Report) -> dict[str, float]:
    """Frames per second of the bundle's engine by schedule, pixels not included."""
    if options.bundle is None:
        return {}
    subject = BundleSubject(str(options.bundle), options.threads)
    layout, frames, speeds = subject.layout, 12, {}
    stream = np.zeros((1, (1 + frames) * layout.frame_length), np.int64)
    stream[:, :: layout.frame_length] = subject.codes
    for schedule in [Schedule.next_token(layout), *schedules]:
        name = schedule_name(schedule)
        report(f"speed of {name}")
        for _ in range(2):  # the first run also warms up
            began = time.perf_counter()
            subject.roll_out(stream, 1, schedule, SamplingSettings(1.0, 0, 0.95), 0)
            speeds[name] = frames / (time.perf_counter() - began)
    return speeds


def _plot(path: Path, scores: list[Scores], speeds: dict[str, float]) -> None:
    if speeds:
        points = [(s.name, speeds[s.name], s.generated_nll.mean, s.generated_nll.error) for s in scores]
        save_plot(path, points, "frames/s, two cores", "NLL of generated tokens under NTP, nats")
    else:
        plain = [(s.name, float(s.passes), s.generated_nll.mean, s.generated_nll.error) for s in scores]
        save_plot(
            path, plain, "forward passes for the generated frames", "NLL of generated tokens under NTP, nats"
        )


def _say(name: str) -> None:
    sys.stderr.write(f"{name}\n")


def main() -> None:
    """Run the study from the command line: ``python -m diagd.world.study``."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "geometry", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, help="adds frames per second")
    args = parser.parse_args()
    run_study(StudyOptions(**vars(args)), _say)


if __name__ == "__main__":
    main()
