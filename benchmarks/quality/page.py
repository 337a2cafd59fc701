"""The page on the quality of Diagonal Decoding, in Markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from benchmarks.quality.decoders import DecoderFigures
from diagd.schedule import RowSeed
from worlds.evaluate import Drift, EvalOptions, Judgement, Scores
from worlds.metrics import Estimate

CONTACT = "truth, next-token prediction and diagonal schedules from the same prompt"
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
    """A way of training: NLL under next-token prediction, and the gap of each schedule to it."""

    name: str
    nll: Estimate
    gaps: dict[str, Estimate]


@dataclass(frozen=True)
class Figures:
    """Everything on the page; a part that was not measured is empty.

    Attributes:
        options: sizes and sampling.
        shipped: the shipped model.
        compat: strict steps against the released code, by size.
        sizes: other sizes, by name.
        training: the same size trained otherwise.
        frames_per_second: by size and schedule.
        parameters: by size.
        decoders: by world.
        worlds: others than the shipped one, by name, each with its drift.
    """

    options: EvalOptions
    shipped: SizeFigures | None = None
    compat: dict[str, list[CompatRow]] = field(default_factory=dict)
    sizes: dict[str, SizeFigures] = field(default_factory=dict)
    training: list[TrainingRow] = field(default_factory=list)
    frames_per_second: dict[str, dict[str, float]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    decoders: dict[str, DecoderFigures] = field(default_factory=dict)
    worlds: dict[str, SizeFigures] = field(default_factory=dict)


def quality_page(figures: Figures, shipped_size: str) -> str:
    """The page in Markdown; ``shipped_size`` names the shipped model among the sizes."""
    sections = _section("# Quality of Diagonal Decoding", _how(figures.options))
    if figures.shipped:
        speeds = figures.frames_per_second.get(shipped_size, {})
        sections += _shipped_lines(figures.shipped, speeds)
        sections += _drift_lines("The shipped model", figures.shipped.drift)
    for world, its in figures.worlds.items():
        sections += _world_lines(world, its)
    for world, found in figures.decoders.items():
        sections += _decoder_lines(world, found)
    sections += _compat_lines(figures.compat)
    sections += _size_lines(figures)
    sections += _training_lines(figures.training)
    return "\n".join(sections)


def _how(evaluation: EvalOptions) -> list[str]:
    sampling = evaluation.sampling
    return _text(
        f"Likelihoods: {evaluation.windows} windows of {evaluation.window_frames} true frames of worlds that "
        f"no model saw, paired by window. Rollouts: {evaluation.rollouts}, each of {evaluation.prompt} "
        f"prompt frames and {evaluation.frames} generated ones, temperature {sampling.temperature:g}, top-p "
        f"{sampling.top_p:g}, the same random numbers for every schedule. Every figure is mean +- standard "
        "error. A difference of less than two standard errors is no difference; such gaps are in italics. "
        "k = w and d = s or kh are next-token prediction, the row NTP."
    )


def _shipped_lines(shipped: SizeFigures, speeds: dict[str, float]) -> list[str]:
    trained = _text(
        "The model was trained on a mixture of schedules with row seed `previous_frame` and refeeding; "
        "the other columns show what it costs to decode otherwise than trained."
    )
    return [
        *_section(
            "## The shipped model: likelihood gap to next-token prediction, nats per token",
            trained,
            _gap_table(shipped.gaps),
        ),
        *_section(
            "## The shipped model: rollouts",
            _rollout_lines(shipped.schedules, speeds),
            _noise_lines(shipped.schedules),
            ["![speed against quality](quality-speed.png)"],
            [f"![{CONTACT}](quality-contact.png)"],
        ),
    ]


def _gap_table(rows: list[GapRow]) -> list[str]:
    heads = ("schedule", "passes", *(f"seed `{seed.value}`" for seed in SEEDS), "no refeed")
    cells = (
        [row.name, row.passes, *(_gap(row.gaps[seed.value]) for seed in SEEDS), _gap(row.without_refeed)]
        for row in rows
    )
    return _table(heads, cells)


_FIGURES: dict[str, tuple[Callable[[Scores], Estimate | None], int]] = {
    "NLL under NTP": (lambda score: score.generated_nll, 3),
    "action followed": (lambda score: score.geometry.followed if score.geometry else None, 3),
    "walks followed": (lambda score: score.geometry.walks_followed if score.geometry else None, 3),
    "tiles consistent": (lambda score: score.geometry.agreement if score.geometry else None, 3),
    "invalid tiles": (lambda score: score.geometry.invalid if score.geometry else None, 3),
    "action recovered": (lambda score: score.recovered, 3),
    "match, last frame": (lambda score: score.truth.match[-1], 3),
    "PSNR, last frame": (lambda score: score.truth.psnr[-1], 1),
    "SSIM, last frame": (lambda score: score.truth.ssim[-1], 3),
    "Frechet": (lambda score: score.truth.frechet, 2),
}
"""Figures of rollouts, each with its digits."""


def _known(scores: Iterable[Scores]) -> dict[str, tuple[list[Estimate], int]]:
    """Those that every schedule has, in the order of the schedules, each with its digits."""
    found = {label: ([of(score) for score in scores], digits) for label, (of, digits) in _FIGURES.items()}
    return {
        label: ([one for one in row if one is not None], digits)
        for label, (row, digits) in found.items()
        if None not in row
    }


def _rollout_lines(scores: list[Scores], speeds: dict[str, float]) -> list[str]:
    known = _known(scores)
    heads = ("schedule", "passes", *known, *(["frames/s"] if speeds else []))
    last = {name: [f"{speed:.1f}"] for name, speed in speeds.items()}
    rows = (
        [score.name, score.passes, *(_plain(row[n], digits) for row, digits in known.values())]
        for n, score in enumerate(scores)
    )
    return _table(heads, ([*row, *last.get(str(row[0]), [])] for row in rows))


def _noise_lines(scores: list[Scores]) -> list[str]:
    """Which figures of the diagonal schedules differ from next-token prediction beyond the noise."""
    known, others = _known(scores), scores[1:]
    beyond = [
        f"{label.split(',')[0]} of {score.name}"
        for n, score in enumerate(others, 1)
        for label, (row, _) in known.items()
        if abs(row[n].mean - row[0].mean) > 2 * math.hypot(row[n].error, row[0].error)
    ]
    verdict = f"beyond it are: {', '.join(beyond)}" if beyond else "none is beyond it"
    return _text(
        f"{len(others) * len(known)} figures of diagonal rollouts are compared with those of NTP, each "
        f"against a noise of two standard errors of the difference: {verdict}."
    )


def _drift_lines(model: str, drift: Drift | None) -> list[str]:
    if drift is None:
        return []
    columns = {
        "walks followed": [s.walks_followed for s in drift.scores],
        "tiles consistent": [s.agreement for s in drift.scores],
        "invalid tiles": [s.invalid for s in drift.scores],
        "action recovered": drift.recovered,
        "dynamics": drift.dynamics,
    }
    known = {name: column for name, column in columns.items() if column}
    rows = ([frame, *(_plain(c[n]) for c in known.values())] for n, frame in enumerate(drift.frames))
    return _section(f"## {model}: drift of long rollouts, k=1 chained", _table(("up to frame", *known), rows))


def _world_lines(world: str, figures: SizeFigures) -> list[str]:
    scores = figures.schedules
    count, rolled = scores[0].nll.count, scores[0].generated_nll.count
    return [
        *_section(
            f"## {world}: likelihood gap to next-token prediction, nats per token",
            _text(f"Next-token prediction: {_plain(scores[0].nll)}, {count} windows."),
            _gap_table(figures.gaps),
        ),
        *_section(
            f"## {world}: rollouts",
            _text(f"{rolled} rollouts."),
            _rollout_lines(scores, {}),
            _noise_lines(scores),
        ),
        *_drift_lines(world, figures.drift),
    ]


def _compat_lines(sizes: dict[str, list[CompatRow]]) -> list[str]:
    if not sizes:
        return []
    windows = max(row.aligned.count for rows in sizes.values() for row in rows)
    heads = (
        "size",
        "schedule",
        "seed `previous_frame`, refeed",
        "seed `duplicate`, no refeed",
        '`compat="mineworld"`',
    )
    cells = (
        [size, row.name, *map(_gap, (row.aligned, row.strict, row.released))]
        for size, rows in sizes.items()
        for row in rows
    )
    return _section(
        "## Strict steps against the released code",
        _text(
            "Gap to next-token prediction on the engine, nats per token, "
            f"{windows} windows. `compat` reproduces the released MineWorld code: rows start "
            "from the newest token of the row above, that stand-in stays in the cache for good, and queries "
            "see slots that nothing was written to as zero rows. The middle column is the same stand-in in a "
            "strict step: it is hidden after its step, and only decoded tokens are seen."
        ),
        _table(heads, cells),
    )


def _size_lines(figures: Figures) -> list[str]:
    if not figures.sizes:
        return []
    lines = _section(
        "## Other sizes",
        _text(
            "Trained like the shipped model, on the same recordings, for the steps that docs/world.md names. "
            "The gaps are to NTP of the same model; the rollouts are fewer."
        ),
    )
    for name, size in figures.sizes.items():
        scores = size.schedules
        speeds = figures.frames_per_second.get(name, {})
        count = figures.parameters.get(name)
        title = f"{name}: {count / 1e6:.2f} M parameters" if count else name
        gaps = ([s.name, _plain(s.nll, 4), _gap(s.nll_gap)] for s in scores)
        lines += _section(
            f"### {title}, {scores[0].generated_nll.count} rollouts",
            _table(("schedule", "NLL", "gap"), gaps),
            _gap_table(size.gaps) if size.gaps else ["Other row seeds were not measured here."],
            _rollout_lines(scores, speeds),
            _noise_lines(scores),
        )
    return lines


def _training_lines(rows: list[TrainingRow]) -> list[str]:
    if not rows:
        return []
    schedules = list(rows[0].gaps)
    cells = ([row.name, _plain(row.nll, 4), *(_gap(row.gaps[name]) for name in schedules)] for row in rows)
    return _section(
        "## What training on the diagonal buys",
        _text(
            "The shipped size, trained in different ways: NLL under NTP, and the gap of each schedule to it, "
            "nats per token. Fine-tuning starts from the first row; its control has as many steps of NTP, so "
            "that the gain is not just more training."
        ),
        _table(("training", "NLL of NTP", *schedules), cells),
    )


def decoders_plot(world: str) -> str:
    """Name of the picture of a world's decoders."""
    return f"quality-decoders-{world}.png"


_JUDGED: dict[str, Callable[[Judgement], Estimate | None]] = {
    "NLL under NTP": lambda judgement: judgement.generated_nll,
    "as NTP": lambda judgement: judgement.ntp_match,
    "match, last frame": lambda judgement: judgement.truth.match[-1],
    "action followed": lambda judgement: judgement.geometry and judgement.geometry.followed,
    "tiles consistent": lambda judgement: judgement.geometry and judgement.geometry.agreement,
}


def _judged(judgement: Judgement) -> list[str]:
    found = (of(judgement) for of in _JUDGED.values())
    return ["" if estimate is None else _plain(estimate) for estimate in found]


def _decoder_lines(world: str, figures: DecoderFigures) -> list[str]:
    count = figures.points[0].judgement.generated_nll.count
    rollouts = (
        f"{count} rollouts of one seed each; CPU time of one core, frames behind the first of a rollout"
    )
    return _section(
        f"## Decoders of {world}",
        _text(
            "Whatever decodes, the same rollouts, in turns. `kept`: share of frames that are the drafter's, "
            "which is the model itself by k=1 serial. `exact`: share of cells that next-token prediction "
            "draws behind the same tokens, `as NTP`: in rollouts of its own, with the same random numbers. "
            f"Bold: no other is as fast and as likely ({rollouts})."
        ),
        _table(
            ("decoder", "frames/s", "passes", "kept", "exact", *_JUDGED),
            [
                (
                    f"**{point.name}**" if point.best else point.name,
                    f"{point.frames_per_second[0]:.1f}",
                    f"{point.passes:.1f}",
                    "" if point.kept is None else f"{point.kept:.0%}",
                    f"{point.exact:.2%}",
                    *_judged(point.judgement),
                )
                for point in figures.points
            ],
        ),
        [f"![speed against likelihood]({decoders_plot(world)})"],
        _text("Passes of a frame by Jacobi decoding in windows of whole frames, exact at any temperature:"),
        _table(("temperature", *figures.passes), [("passes", *map(_plain, figures.passes.values()))]),
        _text("Rollouts by next-token prediction in other precisions, judged by the model in float32:"),
        _table(
            ("precision", *_JUDGED),
            [(precision, *_judged(judgement)) for precision, judgement in figures.precisions.items()],
        ),
    )


def _section(title: str, *parts: list[str]) -> list[str]:
    """A title and what stands below it, an empty line behind each."""
    return [line for part in ([title], *parts) for line in (*part, "")]


def _text(text: str) -> list[str]:
    return textwrap.wrap(text, 110)


def _table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = chain([heads, ["---"] * len(heads)], rows)
    return ["| " + " | ".join(str(cell) for cell in row) + " |" for row in lines]


def _plain(estimate: Estimate, digits: int = 3) -> str:
    return f"{estimate.mean:.{digits}f} +- {estimate.error:.{digits}f}"


def _gap(estimate: Estimate) -> str:
    text = f"{estimate.mean:+.4f} +- {estimate.error:.4f}"
    return text if abs(estimate.mean) > 2 * estimate.error else f"*{text}*"
