"""`diagd eval`: a world model or its bundle under several schedules, as JSON, table and contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diagd.export.families.world import DESCRIPTION, load_codebook, load_world
from diagd.schedule import RowSeed, Schedule, StreamLayout, chained_lag, steps_per_frame
from diagd.tuning.recordings import cached_tokens
from worlds.bundle_subject import BundleSubject
from worlds.collect import random_policy
from worlds.contact_sheet import save_contact_sheet
from worlds.evaluate import EvalOptions, Evaluation, Scores, measure_drift, write_scores
from worlds.geometry import Geometry
from worlds.metrics import Estimate, frechet_distance
from worlds.networks import MetricNetwork
from worlds.subject import Streams, Subject, TorchSubject

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class EvalRun:
    """What `diagd eval` is asked for.

    Attributes:
        model: folder of a world model (run in PyTorch), or its bundle (run on its engine).
        world: folder of the world model the bundle was made from; for its codebook.
        data: recording that the model was not trained on.
        geometry: recording that the rules of the world are learned from; default: ``data``.
        output: folder of eval.json and contact.png.
        lags: (k, d) of each schedule beside next-token prediction.
        row_seed, refeed: of these schedules.
        options: sizes and sampling.
        long_frames: frames of the long rollouts that drift is measured on; 0 for none.
        long_rollouts: how many of them.
        networks: ONNX files of the user's own metrics.
    """

    model: Path
    data: Path
    output: Path
    world: Path | None = None
    geometry: Path | None = None
    lags: tuple[tuple[int, int], ...] = ((1, 9), (1, 20), (2, 28))
    row_seed: RowSeed = RowSeed.PREVIOUS_FRAME
    refeed: bool = True
    options: EvalOptions = field(default_factory=EvalOptions)
    long_frames: int = 0
    long_rollouts: int = 8
    networks: tuple[Path, ...] = ()


def run_eval(run: EvalRun, report: Callable[[str], None] = lambda _: None) -> list[Scores]:
    """Measure, and write eval.json and contact.png; ``report`` hears the name of each schedule in turn.

    Raises:
        UsageError: recordings or networks that cannot be used.
        CheckpointError, BundleError: a model that cannot be read.
    """
    networks = [MetricNetwork(path) for path in run.networks]
    world = run.world or run.model
    codebook = load_codebook(world)
    recording = cached_tokens(run.data, codebook)
    geometry = Geometry.learn(cached_tokens(run.geometry or run.data, codebook), len(codebook))
    subject = open_subject(run.model)
    evaluation = Evaluation(subject, recording, geometry, run.options)
    scores, rollouts, drift, learned = [], {"truth": evaluation.truth}, {}, {}
    for schedule in schedules(subject.layout, run):
        name = schedule_name(schedule)
        report(name)
        score, rolled = evaluation.score(name, schedule)
        scores.append(score)
        rollouts[name] = rolled
        learned[name] = [_network_scores(n, evaluation, rolled) for n in networks]
        if run.long_frames:
            actions = walk_actions(run.long_rollouts, run.long_frames, run.options.seed)
            drift[name] = asdict(measure_drift(evaluation, schedule, actions))
    extra: dict[str, Any] = {"model": run.model.name, "options": asdict(run.options)}
    extra |= {"drift": drift} if drift else {}
    extra |= {"networks": {"files": [p.name for p in run.networks], "scores": learned}} if networks else {}
    write_scores(run.output / "eval.json", scores, extra)
    frames = {name: pictures(subject, streams[:1]) for name, streams in rollouts.items()}
    save_contact_sheet(run.output / "contact.png", {name: clips[0] for name, clips in frames.items()})
    return scores


def open_subject(model: Path) -> Subject:
    """The model in a folder, or a bundle on its engine."""
    return TorchSubject(load_world(model)) if (model / DESCRIPTION).exists() else BundleSubject(str(model))


def schedules(layout: StreamLayout, run: EvalRun) -> list[Schedule]:
    """Next-token prediction, then the schedules asked for."""
    return [
        Schedule.next_token(layout),
        *(Schedule(layout, k, d, run.row_seed, run.refeed) for k, d in run.lags),
    ]


def schedule_name(schedule: Schedule) -> str:
    """Short name of a schedule."""
    layout, k, d = schedule.layout, schedule.k, schedule.d
    if k == layout.columns:
        return "NTP"
    named = {
        chained_lag(layout.rows, k): " chained",
        steps_per_frame(layout.rows, layout.columns, k): " serial",
    }
    return f"k={k}{named.get(d, f' d={d}')}"


def walk_actions(rollouts: int, frames: int, seed: int) -> NDArray[np.int64]:
    """Actions int64 [rollouts, frames] of the random policy that recordings are made with."""
    policies = [random_policy(np.random.default_rng((seed, n)), 0.72) for n in range(rollouts)]
    return np.array([[next(policy) for _ in range(frames)] for policy in policies])


def scores_table(scores: Sequence[Scores]) -> Table:
    """The figures as a table for the console, each with its standard error."""
    from rich.table import Table

    heads = ("NLL", "gap to NTP", "generated NLL", "followed", "walks", "invalid", "last match", "Frechet")
    table = Table("schedule", "passes", *heads, title="mean +- standard error")
    for score in scores:
        geometry, truth = score.geometry, score.truth
        likelihoods = (score.nll, score.nll_gap, score.generated_nll)
        judged = (
            geometry.followed,
            geometry.walks_followed,
            geometry.invalid,
            truth.match[-1],
            truth.frechet,
        )
        table.add_row(score.name, str(score.passes), *map(_cell, (*likelihoods, *judged)))
    return table


def _cell(estimate: Estimate) -> str:
    return f"{estimate.mean:.4f} +- {estimate.error:.4f}"


def pictures(subject: Subject, streams: Streams) -> NDArray[np.uint8]:
    """Frames uint8 [B, F, H, W, 3] of streams int64 [B, N]."""
    layout = subject.layout
    cells = streams.reshape(len(streams), -1, layout.frame_length)[:, :, layout.before :]
    clips = cells.reshape(len(streams), -1, layout.rows, layout.columns)
    return np.stack([subject.pixels(clip) for clip in clips])


def _network_scores(network: MetricNetwork, evaluation: Evaluation, rolled: Streams) -> dict[str, Any]:
    prompt = evaluation.options.prompt
    clips, truth = (pictures(evaluation.subject, s)[:, prompt:] for s in (rolled, evaluation.truth))
    if network.takes_pairs:
        return {"distance": asdict(Estimate.of(network.distances(clips, truth).mean(1)))}
    distance = frechet_distance(network.features(clips), network.features(truth))
    return {"frechet": distance, "rollouts": len(clips)}
