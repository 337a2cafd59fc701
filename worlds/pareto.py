"""Speed against quality: decoders and drafts over the same rollouts, and which of them nothing else beats."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from diagd.bundle import Bundle, Manifest
from diagd.bundle.files import atomic_file
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.runtime.comparison import audit
from diagd.runtime.decoders import Decoder, DraftDecoder, ScheduledDecoder
from diagd.runtime.decoders.draft import Proposal, Scorer, open_scorer, worst_likelihood
from diagd.runtime.options import DRAFT, DraftOptions, parse_decoder
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.schedule import StreamLayout
from diagd.tuning.rollouts import Streams, parts
from worlds.evaluate import Evaluation, Judgement
from worlds.report import write_json

QUANTILES: Final = tuple(n / 10 for n in range(1, 10))
CONTROLS: Final = (0.25, 0.5, 0.75)
EVERYTHING: Final = -1e30
"""A bar that every draft passes, the first of a rollout aside, and that is scored all the same."""

Report = Callable[[str], None]
Clock = Callable[[], float]
Item = TypeVar("Item")


@dataclass
class Contestant:
    """A decoder, and what its frames took; the first of a rollout, which feeds the prompt, is not counted."""

    name: str
    curve: str
    decoder: Decoder
    seconds: list[float] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    rolled: list[Streams] = field(default_factory=list)


@dataclass(frozen=True)
class Point:
    """One decoder.

    Attributes:
        curve: it belongs to, such as all values of tau.
        frames_per_second: median, and between the tenth and ninetieth of a hundred frames.
        passes: of the target, a frame.
        kept: share of frames that are the drafter's; None without one.
        exact: share of cells that next-token prediction draws behind the same tokens ahead of them.
        best: no other is as fast and as likely under next-token prediction, and better in one of the two.
    """

    name: str
    curve: str
    frames_per_second: tuple[float, float, float]
    passes: float
    kept: float | None
    exact: float
    judgement: Judgement
    best: bool = False


def compare(
    target: Session,
    bundle: Bundle,
    evaluation: Evaluation,
    decoders: Sequence[str],
    options: DraftOptions,
    cpu: CpuOptions,
    report: Report = lambda _: None,
    clock: Clock = time.perf_counter,
) -> list[Point]:
    """Roll out by every decoder, in turns, and judge.

    ``target`` is a session over the bundle. Decoders are ``k=1 chained`` or another order, ``jacobi``, or
    ``draft``: the drafter, the target, and all between.

    Raises:
        UsageError: a decoder or scorer that is none, or a drafter that does not fit.
    """
    contestants = [_plain(name, bundle.manifest) for name in decoders if name != DRAFT]
    with ExitStack() as stack:
        if DRAFT in decoders:
            drafter = options.open(bundle, target.window, cpu, stack)
            contestants += _drafts(target, drafter, PixelCodec(bundle, cpu), evaluation, options, report)
        for number in counted(range(len(evaluation.truth)), "rollout", report):
            for contestant in contestants:
                roll_out(target, contestant, evaluation, number, clock=clock)
    return _marked([_point(one, evaluation) for one in counted(contestants, "judging decoder", report)])


def counted(items: Sequence[Item], what: str, report: Report) -> Iterator[Item]:
    """Iterate, saying which it is, of how many, and how long the rest takes."""
    began = time.perf_counter()
    for done, item in enumerate(items):
        rest = (time.perf_counter() - began) / done * (len(items) - done) if done else math.nan
        report(f"{what} {done + 1} of {len(items)}" + (f", {rest:.0f} s left" if done else ""))
        yield item


def _plain(name: str, manifest: Manifest) -> Contestant:
    decoder = parse_decoder(name, manifest)
    return Contestant(name, "orders" if isinstance(decoder, ScheduledDecoder) else "jacobi", decoder)


def _drafts(
    target: Session,
    drafter: Session,
    pixels: PixelCodec,
    evaluation: Evaluation,
    options: DraftOptions,
    report: Report,
) -> Iterator[Contestant]:
    """Both ends of the knob, nine bars between, and the controls.

    Bars are quantiles of the scores of drafts, so that points are spread evenly over what is kept. Controls
    keep as much by chance, by the mean of all cells in place of the worst, and without the target's first
    frame.
    """
    draft = partial(options.decoder, drafter)
    frames, actions = _known(target.layout, evaluation, 0)
    target.start(frames, actions[: len(frames)])
    ahead, sampling = list(actions[len(frames) :]), evaluation.options.sampling
    scorer = open_scorer(options.score, target, ahead, pixels, sampling)
    scores, means = _scores(target, draft, evaluation, (scorer, _mean), report)
    yield Contestant("drafter", "draft", draft(-math.inf, scorer))
    for share, tau in zip(QUANTILES, np.quantile(scores, QUANTILES).tolist(), strict=True):
        yield Contestant(f"tau {tau:.3g}", "draft", draft(tau, scorer))
        chance = np.random.default_rng(round(100 * share))
        yield Contestant(f"{1 - share:.0%} by chance", "chance", draft(share, _by_chance(chance)))
    yield Contestant("target", "draft", draft(math.inf, scorer))
    for share, tau in zip(CONTROLS, np.quantile(means, CONTROLS).tolist(), strict=True):
        yield Contestant(f"{1 - share:.0%} by the mean", "mean", draft(tau, _mean))
    for share, tau in zip(CONTROLS, np.quantile(scores, CONTROLS).tolist(), strict=True):
        free = draft(tau, scorer, target_first=False)
        yield Contestant(f"{1 - share:.0%}, no first frame", "no first frame", free)


def _by_chance(random: np.random.Generator) -> Scorer:
    return lambda proposal: float(random.random())


def _mean(proposal: Proposal) -> float:
    """Log-likelihood of all cells, not of the worst."""
    return worst_likelihood(proposal.tokens, proposal.logits, share=1.0)


def _scores(
    target: Session,
    draft: Callable[[float, Scorer], DraftDecoder],
    evaluation: Evaluation,
    scorers: Sequence[Scorer],
    report: Report,
) -> NDArray[np.float64]:
    """Scores [scorers, drafts] of drafts in rollouts that keep all of them."""
    found: list[list[float]] = []

    def look(proposal: Proposal) -> float:
        found.append([scorer(proposal) for scorer in scorers])
        return 0.0

    decoder = draft(EVERYTHING, look)
    for number in counted(range(len(evaluation.truth)), "draft scores, rollout", report):
        roll_out(target, Contestant("", "", decoder), evaluation, number)
    scores: NDArray[np.float64] = np.array(found).T
    return scores[:, np.isfinite(scores).all(axis=0)]


def _known(layout: StreamLayout, evaluation: Evaluation, number: int) -> tuple[Any, Any]:
    """Prompt frames int32 [P, rows, columns] of a rollout, and the actions [F, 1] of all its frames."""
    cells, actions = parts(evaluation.truth[number : number + 1], layout)
    return cells[0, : evaluation.options.prompt], actions[0]


def roll_out(
    session: Session,
    contestant: Contestant,
    evaluation: Evaluation,
    number: int,
    sampling: SamplingSettings | None = None,
    clock: Clock = time.perf_counter,
) -> None:
    """One rollout; ``sampling`` is the evaluation's unless told otherwise."""
    frames, actions = _known(session.layout, evaluation, number)
    before, after = actions[: len(frames)], actions[len(frames) :]
    options, stream = evaluation.options, evaluation.truth[number].copy()
    rules, seed = sampling or options.sampling, options.seed + number
    session.start(frames, before)
    made, ends = [], []
    for frame in session.frames(contestant.decoder, after, sampling=rules, seed=seed):
        made.append(frame)
        ends.append(clock())
    tokens = np.stack([frame.tokens for frame in made])
    if all(frame.exact for frame in made):
        contestant.exact += [1.0] * len(made)
    else:
        session.start(frames, before)
        contestant.exact += audit(session, tokens, after, sampling=rules, seed=seed).tolist()
    stream.reshape(-1, session.layout.frame_length)[len(frames) :, 1:] = tokens.reshape(len(made), -1)
    contestant.rolled.append(stream)
    contestant.seconds += np.diff(ends).tolist()
    contestant.passes += [frame.steps for frame in made[1:]]


def _point(contestant: Contestant, evaluation: Evaluation) -> Point:
    slow, middle, quick = (float(1 / q) for q in np.quantile(contestant.seconds, (0.9, 0.5, 0.1)))
    decoder = contestant.decoder
    return Point(
        contestant.name,
        contestant.curve,
        (middle, slow, quick),
        float(np.mean(contestant.passes)),
        float(np.mean(decoder.kept)) if isinstance(decoder, DraftDecoder) else None,
        float(np.mean(contestant.exact)),
        evaluation.judge(np.stack(contestant.rolled)),
    )


def _marked(points: list[Point]) -> list[Point]:
    """The same, with those marked that none beats."""
    figures = [(p.frames_per_second[0], -p.judgement.generated_nll.mean) for p in points]

    def beaten(own: tuple[float, float]) -> bool:
        return any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in figures)

    return [replace(point, best=not beaten(own)) for point, own in zip(points, figures, strict=True)]


def points_table(points: Sequence[Point]) -> Table:
    """The figures as a table for the console."""
    heads = ("frames/s", "passes", "drafter's", "exact", "generated NLL", "as NTP", "best")
    table = Table("decoder", *heads, title="speed against quality")
    for point in points:
        kept = "-" if point.kept is None else f"{point.kept:.0%}"
        nll, match = point.judgement.generated_nll, point.judgement.ntp_match
        table.add_row(
            point.name,
            f"{point.frames_per_second[0]:.1f}",
            f"{point.passes:.1f}",
            kept,
            f"{point.exact:.2%}",
            f"{nll.mean:.4f} +- {nll.error:.4f}",
            f"{match.mean:.3f}" if match else "-",
            "*" if point.best else "",
        )
    return table


def write_points(folder: Path, points: Sequence[Point], extra: dict[str, Any]) -> None:
    """Write pareto.json and pareto.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "pareto.json", {"decoders": list(points)} | extra)
    plot_points(folder / "pareto.png", points)


def plot_points(path: Path, points: Sequence[Point]) -> None:
    """Write a PNG of speed against likelihood, with what nothing else beats circled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for curve in dict.fromkeys(point.curve for point in points):
        own = sorted((p for p in points if p.curve == curve), key=lambda p: p.frames_per_second[0])
        across = [p.frames_per_second[0] for p in own]
        up, error = ([getattr(p.judgement.generated_nll, what) for p in own] for what in ("mean", "error"))
        line = "" if curve == "orders" else "-"
        axes.errorbar(across, up, error, fmt=f"o{line}", markersize=4, linewidth=0.8, label=curve)
    for point in (p for p in points if p.best):
        at = point.frames_per_second[0], point.judgement.generated_nll.mean
        axes.plot(*at, "o", markersize=10, markerfacecolor="none", markeredgecolor="black")
        axes.annotate(point.name, at, textcoords="offset points", xytext=(6, 6), fontsize=7)
    axes.set_xlabel("frames/s, median")
    axes.set_ylabel("nats per token under next-token prediction")
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    axes.set_title("circled: no other decoder is as fast and as likely", fontsize=8)
    with atomic_file(path) as partial_file:
        figure.savefig(partial_file, format="png")
