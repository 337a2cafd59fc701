"""Decoders and precisions of a trained world, whichever it is: speed, passes and likelihood."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.cpu import calibrated
from diagd.bundle import Bundle
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.runtime.decoders import Decoder, JacobiDecoder, ScheduledDecoder
from diagd.runtime.load import open_session
from diagd.runtime.options import DRAFT, DraftOptions
from diagd.runtime.session import Session
from diagd.schedule import Schedule
from worlds.evaluate import Evaluation, Judgement
from worlds.metrics import Estimate
from worlds.pareto import Contestant, Point, compare, counted, roll_out

DECODERS: Final = (
    "next token",
    *(f"k={k} {frames}" for k in (1, 2, 4) for frames in ("serial", "chained")),
    "jacobi",
    DRAFT,
)
TEMPERATURES: Final = (0.0, 0.7, 1.0, 1.5)
DRAFTS: Final = DraftOptions(drafter_decoder="k=1 serial")
PRECISIONS: Final = ("int8", "int4-weight")
CPU: Final = CpuOptions(threads=1)


@dataclass(frozen=True)
class DecoderFigures:
    """One world.

    Attributes:
        points: its decoders, drafts with nine bars and controls among them.
        passes: of Jacobi decoding a frame, in windows of whole frames, by temperature.
        precisions: rollouts by next-token prediction, by precision of the step graph.
    """

    points: list[Point]
    passes: dict[str, Estimate]
    precisions: dict[str, Judgement]


def decoder_figures(
    path: Path,
    evaluation: Evaluation,
    report: Callable[[str], None],
    decoders: Sequence[str] = DECODERS,
    precisions: Sequence[str] = PRECISIONS,
) -> DecoderFigures:
    """Measure a bundle, which gets the precisions that it lacks."""
    bundle = Bundle.open(path)
    with open_session(bundle, cpu=CPU) as session:
        points = compare(session, bundle, evaluation, decoders, DRAFTS, CPU, report, time.process_time)
        passes = {
            f"{heat:g}": jacobi_passes(session, evaluation, heat)
            for heat in counted(TEMPERATURES, "Jacobi decoding, temperature", report)
        }
    layout, judged = bundle.manifest.layout, {}
    known = evaluation.windows.reshape(-1, layout.frame_length)[:, 1:].astype(np.int32)
    bundle = calibrated(path, precisions, known.reshape(-1, layout.rows, layout.columns))
    for precision in ("fp32", *precisions):
        report(f"rollouts in {precision}")
        with open_session(bundle, cpu=CPU, precision=precision) as session:
            order = ScheduledDecoder(Schedule.next_token(session.layout))
            rolled = rolled_out(session, evaluation, order).rolled
        judged[precision] = evaluation.judge(np.stack(rolled))
    return DecoderFigures(points, passes, judged)


def jacobi_passes(session: Session, evaluation: Evaluation, temperature: float) -> Estimate:
    """Passes of a frame behind the first, the mean of each rollout; top-p as in the evaluation."""
    decoder = JacobiDecoder(session.layout.cells)
    found = rolled_out(session, evaluation, decoder, temperature).passes
    return Estimate.of(np.reshape(found, (len(evaluation.truth), -1)).mean(axis=1))


def rolled_out(
    session: Session, evaluation: Evaluation, decoder: Decoder, temperature: float | None = None
) -> Contestant:
    sampling = evaluation.options.sampling
    if temperature is not None:
        sampling = replace(sampling, temperature=temperature)
    contestant = Contestant("", "", decoder)
    for number in range(len(evaluation.truth)):
        roll_out(session, contestant, evaluation, number, sampling)
    return contestant
