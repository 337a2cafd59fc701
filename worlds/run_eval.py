"""`diagd eval`: a world model or its bundle under several schedules, as JSON, table and contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.cluster import open_workers
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.runtime.load import open_session
from diagd.schedule import Schedule, StreamLayout
from diagd.tuning.recordings import TokenDataset, cached_tokens
from diagd.tuning.reward import Probe, Transitions
from diagd.tuning.rollouts import Streams, parts
from worlds.collect import random_policy
from worlds.evaluate import Evaluation, Scores, measure_drift
from worlds.geometry import Geometry
from worlds.metrics import Estimate, MetricNetwork, frechet_distance
from worlds.model import ModelWorker, ParallelModel, WorldModel, open_model
from worlds.options import EvalRun
from worlds.pareto import Point, compare, write_points
from worlds.recordings import recorded_actions
from worlds.report import save_contact_sheet, write_scores

Report = Callable[[str], None]

_PROBED = 20_000


def run_eval(run: EvalRun, report: Report = lambda _: None) -> list[Scores]:
    """Measure, and write eval.json and contact.png; ``report`` hears the name of each schedule in turn.

    The figures of geometry are None for worlds whose geometry is not known.

    Raises:
        UsageError: recordings or networks that cannot be used.
        CheckpointError, BundleError: a model that cannot be read.
    """
    with opened(run) as model:
        return _score(run, model, report)


def _score(run: EvalRun, model: WorldModel, report: Report) -> list[Scores]:
    networks = [MetricNetwork(path) for path in run.networks]
    orders = schedules(model.layout, run)
    evaluation = _evaluation(run, model)
    report("a probe of the actions")
    evaluation.probe, probed = fit_probe(model, run.data, run.geometry, run.probe_steps, run.options.seed)
    report("rollouts")
    evaluation.rollouts(orders)
    scores, rollouts, drift, learned = [], {"truth": evaluation.truth}, {}, {}
    for schedule in orders:
        name = schedule.name
        report(name)
        score, rollouts[name] = evaluation.score(name, schedule)
        scores.append(score)
        learned[name] = [_network_scores(n, evaluation, rollouts[name]) for n in networks]
        if run.long_frames:
            count = min(run.long_rollouts, len(evaluation.truth))  # behind prompts of these
            actions = recorded_walks(model, run.data, count, run.long_frames, run.options.seed)
            drift[name] = asdict(measure_drift(evaluation, schedule, actions))
    extra: dict[str, Any] = {"model": run.model.name, "options": asdict(evaluation.options)}
    extra |= {"probe": probed} if probed else {}
    extra |= {"drift": drift} if drift else {}
    extra |= {"networks": {"files": [p.name for p in run.networks], "scores": learned}} if networks else {}
    write_scores(run.output / "eval.json", scores, extra)
    sheet = {name: pictures(model, streams[:1])[0] for name, streams in rollouts.items()}
    save_contact_sheet(run.output / "contact.png", sheet)
    return scores


@contextmanager
def opened(run: EvalRun) -> Iterator[WorldModel]:
    """The model that is asked for; workers do its passes where there are some."""
    model = open_model(run.model, run.precision, run.backend, run.threads)
    if not run.who.is_asked:
        yield model
        return
    with open_workers(partial(ModelWorker, run.model, run.precision, run.backend), run.who) as workers:
        yield ParallelModel(model, workers)


def _evaluation(run: EvalRun, model: WorldModel) -> Evaluation:
    recording = cached_tokens(run.data, model.encoder)
    geometry = None
    if Geometry.is_known(model.layout, recorded_actions(run.data)):
        rules = cached_tokens(run.geometry, model.encoder) if run.geometry else recording
        geometry = Geometry.learn(rules, model.codes)
    frames = min(run.options.window_frames, model.context_frames)
    return Evaluation(model, recording, geometry, replace(run.options, window_frames=frames))


def fit_probe(
    model: WorldModel, data: Path, rules: Path | None, steps: int, seed: int = 0
) -> tuple[Probe | None, dict[str, float]]:
    """A probe of the actions of a recording, and how many it reads of true frames that it did not learn from.

    It learns from the recording of the rules if one is given, else from the first three quarters of the data,
    and is tested on the last one. There is none where nothing varies.
    """
    true = _transitions(cached_tokens(data, model.encoder), model.layout)
    last = slice(3 * len(true) // 4, None)
    seen = true[: last.start]
    if rules is not None:
        seen = _transitions(cached_tokens(rules, model.encoder), model.layout)
    if not seen.vary or not len(true[last]):
        return None, {}
    ids = max(int(seen.before.max()), model.codes) + 1
    probe = Probe.fit(seen, ids, steps=steps, seed=seed)
    found = {"right": probe.read(true[last])[1].mean(), "commonest": probe.commonest(true[last].led)}
    return probe, {name: float(share) for name, share in found.items()}


def _transitions(recording: TokenDataset, layout: StreamLayout) -> Transitions:
    """Up to `_PROBED` of a recording, evenly spread."""
    starts = recording.window_starts(2)
    return Transitions.of(recording.windows(starts[:: -(-len(starts) // _PROBED)], 2), layout)


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


def recorded_walks(model: WorldModel, data: Path, rollouts: int, frames: int, seed: int) -> NDArray[np.int64]:
    """Actions int64 [rollouts, frames] as they follow each other in the recording, over and over."""
    recording = cached_tokens(data, model.encoder)
    starts = np.random.default_rng(seed).integers(recording.frames, size=rollouts)
    rows = (starts[:, None] + np.arange(frames)) % recording.frames
    actions: NDArray[np.int64] = recording.streams[rows, 0].astype(np.int64) - model.codes
    return actions


def pictures(model: WorldModel, streams: Streams) -> NDArray[np.uint8]:
    """Frames uint8 [B, F, H, W, 3] of streams int64 [B, N]."""
    return np.stack([model.pixels(clip) for clip in parts(streams, model.layout)[0]])


def _network_scores(network: MetricNetwork, evaluation: Evaluation, rolled: Streams) -> dict[str, Any]:
    prompt = evaluation.options.prompt
    clips, truth = (pictures(evaluation.model, s)[:, prompt:] for s in (rolled, evaluation.truth))
    if network.takes_pairs:
        return {"distance": asdict(Estimate.of(network.distances(clips, truth).mean(1)))}
    distance = frechet_distance(network.features(clips), network.features(truth))
    return {"frechet": distance, "rollouts": len(clips)}
