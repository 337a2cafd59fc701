"""`diagd eval`: a world model or its bundle under several schedules, as JSON, table and contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.cluster import open_workers
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.runtime.load import open_session
from diagd.schedule import Schedule, StreamLayout
from diagd.tuning.recordings import cached_tokens, recorded_actions
from worlds.collect import random_policy
from worlds.evaluate import Evaluation, Scores, measure_drift
from worlds.geometry import UNKNOWN_GEOMETRY, Geometry
from worlds.hands import Hand, ManyHands
from worlds.metrics import Estimate, MetricNetwork, frechet_distance
from worlds.model import Streams, WorldModel, open_model
from worlds.options import EvalRun
from worlds.pareto import Point, compare, write_points
from worlds.report import save_contact_sheet, write_scores

Report = Callable[[str], None]


def run_eval(run: EvalRun, report: Report = lambda _: None) -> list[Scores]:
    """Measure, and write eval.json and contact.png; ``report`` hears the name of each schedule in turn.

    The figures of geometry are None for worlds whose geometry is not known.

    Raises:
        UsageError: recordings or networks that cannot be used, or a drift that cannot be judged.
        CheckpointError, BundleError: a model that cannot be read.
    """
    with opened(run) as model:
        return _score(run, model, report)


def _score(run: EvalRun, model: WorldModel, report: Report) -> list[Scores]:
    networks = [MetricNetwork(path) for path in run.networks]
    orders = schedules(model.layout, run)
    evaluation = _evaluation(run, model)
    scores, rollouts, drift, learned = [], {"truth": evaluation.truth}, {}, {}
    for schedule in orders:
        name = schedule.name
        report(name)
        score, rollouts[name] = evaluation.score(name, schedule)
        scores.append(score)
        learned[name] = [_network_scores(n, evaluation, rollouts[name]) for n in networks]
        if run.long_frames:
            actions = walk_actions(run.long_rollouts, run.long_frames, run.options.seed)
            drift[name] = asdict(measure_drift(evaluation, schedule, actions))
    extra: dict[str, Any] = {"model": run.model.name, "options": asdict(evaluation.options)}
    extra |= {"drift": drift} if drift else {}
    extra |= {"networks": {"files": [p.name for p in run.networks], "scores": learned}} if networks else {}
    write_scores(run.output / "eval.json", scores, extra)
    sheet = {name: pictures(model, streams[:1])[0] for name, streams in rollouts.items()}
    save_contact_sheet(run.output / "contact.png", sheet)
    return scores


@contextmanager
def opened(run: EvalRun) -> Iterator[WorldModel]:
    """The model that is asked for; workers do its passes where there are some."""
    model = open_model(run.model, run.precision, run.backend)
    if not run.who.is_asked:
        yield model
        return
    with open_workers(partial(Hand, run.model, run.precision, run.backend), run.who) as workers:
        yield ManyHands(model, workers)


def _evaluation(run: EvalRun, model: WorldModel) -> Evaluation:
    recording = cached_tokens(run.data, model.encoder)
    geometry = None
    if Geometry.is_known(model.layout, recorded_actions(run.data)):
        rules = cached_tokens(run.geometry, model.encoder) if run.geometry else recording
        geometry = Geometry.learn(rules, model.codes)
    elif run.long_frames:
        raise UsageError(f"long_frames: drift is judged by the geometry of the world; {UNKNOWN_GEOMETRY}")
    frames = min(run.options.window_frames, model.context_frames)
    return Evaluation(model, recording, geometry, replace(run.options, window_frames=frames))


def run_pareto(run: EvalRun, report: Report = lambda _: None) -> list[Point]:
    """Compare decoders of a bundle, and write pareto.json and pareto.png.

    Raises:
        UsageError: recordings, decoders or a scorer that cannot be used.
        BundleError: a bundle that cannot be read.
    """
    bundle, cpu = Bundle.open(run.model), CpuOptions(run.threads)
    few = replace(run.options, windows=2)  # the likelihood of true windows is not asked for
    with (
        opened(run) as model,
        open_session(bundle, cpu=cpu, precision=run.precision, backend=run.backend) as target,
    ):
        evaluation = _evaluation(replace(run, options=few), model)
        points = compare(target, bundle, evaluation, run.decoders, run.drafts, cpu, report)
    write_points(run.output, points, {"model": run.model.name, "options": asdict(evaluation.options)})
    return points


def schedules(layout: StreamLayout, run: EvalRun) -> list[Schedule]:
    """Next-token prediction, then the schedules asked for."""
    return [Schedule.next_token(layout), *(Schedule.parse(order, layout) for order in run.order)]


def walk_actions(rollouts: int, frames: int, seed: int) -> NDArray[np.int64]:
    """Actions int64 [rollouts, frames] of the random policy that recordings are made with."""
    policies = [random_policy(np.random.default_rng((seed, n)), 0.72) for n in range(rollouts)]
    return np.array([[next(policy) for _ in range(frames)] for policy in policies])


def pictures(model: WorldModel, streams: Streams) -> NDArray[np.uint8]:
    """Frames uint8 [B, F, H, W, 3] of streams int64 [B, N]."""
    layout = model.layout
    cells = streams.reshape(len(streams), -1, layout.frame_length)[:, :, layout.before :]
    clips = cells.reshape(len(streams), -1, layout.rows, layout.columns)
    return np.stack([model.pixels(clip) for clip in clips])


def _network_scores(network: MetricNetwork, evaluation: Evaluation, rolled: Streams) -> dict[str, Any]:
    prompt = evaluation.options.prompt
    clips, truth = (pictures(evaluation.model, s)[:, prompt:] for s in (rolled, evaluation.truth))
    if network.takes_pairs:
        return {"distance": asdict(Estimate.of(network.distances(clips, truth).mean(1)))}
    distance = frechet_distance(network.features(clips), network.features(truth))
    return {"frechet": distance, "rollouts": len(clips)}
