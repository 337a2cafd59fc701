"""The page on the quality of Diagonal Decoding, in Markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from benchmarks.quality.parts import SEEDS, CompatRow, GapRow, ShippedFigures, SizeFigures, TrainingRow
from worlds.evaluate import Drift, EvalOptions, Scores
from worlds.metrics import Estimate


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
    """

    options: EvalOptions
    shipped: ShippedFigures | None = None
    compat: dict[str, list[CompatRow]] = field(default_factory=dict)
    sizes: dict[str, SizeFigures] = field(default_factory=dict)
    training: list[TrainingRow] = field(default_factory=list)
    frames_per_second: dict[str, dict[str, float]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)


def quality_page(figures: Figures, shipped_size: str) -> str:
    """The page in Markdown; ``shipped_size`` names the shipped model among the sizes."""
    sections = ["# Quality of Diagonal Decoding", "", *_how(figures.options), ""]
    if figures.shipped:
        speeds = figures.frames_per_second.get(shipped_size, {})
        sections += _shipped_lines(figures.shipped, speeds)
        sections += _drift_lines(figures.shipped.drift)
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


def _shipped_lines(shipped: ShippedFigures, speeds: dict[str, float]) -> list[str]:
    return [
        "## The shipped model: likelihood gap to next-token prediction, nats per token",
        "",
        *_text(
            "The model was trained on a mixture of schedules with row seed `previous_frame` and refeeding; "
            "the other columns show what it costs to decode otherwise than trained."
        ),
        "",
        *_gap_table(shipped.gaps),
        "",
        "## The shipped model: rollouts",
        "",
        *_rollout_lines(shipped.schedules, speeds),
        "",
        *_noise_lines(shipped.schedules),
        "",
        "![speed against quality](quality-speed.png)",
        "",
        "![truth, next-token prediction and diagonal schedules from the same prompt](quality-contact.png)",
        "",
    ]


def _gap_table(rows: list[GapRow]) -> list[str]:
    heads = ("schedule", "passes", *(f"seed `{seed.value}`" for seed in SEEDS), "no refeed")
    cells = (
        [row.name, row.passes, *(_gap(row.gaps[seed.value]) for seed in SEEDS), _gap(row.without_refeed)]
        for row in rows
    )
    return _table(heads, cells)


_ROLLOUT_HEADS = (
    "schedule",
    "passes",
    "NLL under NTP",
    "action followed",
    "walks followed",
    "tiles consistent",
    "invalid tiles",
    "match, last frame",
    "PSNR, last frame",
    "SSIM, last frame",
    "Frechet",
)


def _rollout_lines(scores: list[Scores], speeds: dict[str, float]) -> list[str]:
    heads = (*_ROLLOUT_HEADS, "frames/s") if speeds else _ROLLOUT_HEADS
    last = {name: [f"{speed:.1f}"] for name, speed in speeds.items()}
    return _table(heads, ([*_rollout_cells(score), *last.get(score.name, [])] for score in scores))


def _rollout_cells(score: Scores) -> list[object]:
    geometry, truth = score.geometry, score.truth
    shown = (
        geometry.followed,
        geometry.walks_followed,
        geometry.agreement,
        geometry.invalid,
        truth.match[-1],
    )
    last = (f"{truth.psnr[-1].mean:.1f} +- {truth.psnr[-1].error:.1f}", _plain(truth.ssim[-1]))
    return [
        score.name,
        score.passes,
        _plain(score.generated_nll),
        *map(_plain, shown),
        *last,
        f"{truth.frechet.mean:.2f} +- {truth.frechet.error:.2f}",
    ]


_COMPARED: dict[str, Callable[[Scores], Estimate]] = {
    "NLL under NTP": lambda score: score.generated_nll,
    "action followed": lambda score: score.geometry.followed,
    "walks followed": lambda score: score.geometry.walks_followed,
    "tiles consistent": lambda score: score.geometry.agreement,
    "invalid tiles": lambda score: score.geometry.invalid,
    "match": lambda score: score.truth.match[-1],
    "PSNR": lambda score: score.truth.psnr[-1],
    "SSIM": lambda score: score.truth.ssim[-1],
    "Frechet": lambda score: score.truth.frechet,
}


def _noise_lines(scores: list[Scores]) -> list[str]:
    """Which figures of the diagonal schedules differ from next-token prediction beyond the noise."""
    base, *others = scores
    beyond = [
        f"{label} of {score.name}"
        for score in others
        for label, of in _COMPARED.items()
        if _differs(of(score), of(base))
    ]
    verdict = f"beyond it are: {', '.join(beyond)}" if beyond else "none is beyond it"
    return _text(
        f"{len(others) * len(_COMPARED)} figures of diagonal rollouts are compared with those of NTP, each "
        f"against a noise of two standard errors of the difference: {verdict}."
    )


def _differs(first: Estimate, second: Estimate) -> bool:
    return abs(first.mean - second.mean) > 2 * math.hypot(first.error, second.error)


def _drift_lines(drift: Drift) -> list[str]:
    rows = (
        [frame, _plain(s.walks_followed), _plain(s.agreement), _plain(s.invalid)]
        for frame, s in zip(drift.frames, drift.scores, strict=True)
    )
    return [
        "## The shipped model: drift of long rollouts, k=1 chained",
        "",
        *_table(("up to frame", "walks followed", "tiles consistent", "invalid tiles"), rows),
        "",
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
    return [
        "## Strict steps against the released code",
        "",
        *_text(
            "Gap to next-token prediction on the engine, nats per token, "
            f"{windows} windows. `compat` reproduces the released MineWorld code: rows start "
            "from the newest token of the row above, that stand-in stays in the cache for good, and queries "
            "see slots that nothing was written to as zero rows. The middle column is the same stand-in in a "
            "strict step: it is hidden after its step, and only decoded tokens are seen."
        ),
        "",
        *_table(heads, cells),
        "",
    ]


def _size_lines(figures: Figures) -> list[str]:
    if not figures.sizes:
        return []
    lines = ["## Other sizes", ""]
    lines += _text(
        "Trained like the shipped model, on the same recordings, for the steps that docs/world.md names. The "
        "gaps are to NTP of the same model; the rollouts are fewer."
    )
    for name, size in figures.sizes.items():
        scores = size.schedules
        speeds = figures.frames_per_second.get(name, {})
        count = figures.parameters.get(name)
        title = f"{name}: {count / 1e6:.2f} M parameters" if count else name
        lines += ["", f"### {title}, {scores[0].generated_nll.count} rollouts", ""]
        gaps = ([s.name, _plain(s.nll, 4), _gap(s.nll_gap)] for s in scores)
        lines += _table(("schedule", "NLL", "gap"), gaps)
        seeds = _gap_table(size.gaps) if size.gaps else ["Other row seeds were not measured here."]
        lines += ["", *seeds]
        lines += ["", *_rollout_lines(scores, speeds), "", *_noise_lines(scores)]
    return [*lines, ""]


def _training_lines(rows: list[TrainingRow]) -> list[str]:
    if not rows:
        return []
    schedules = list(rows[0].gaps)
    cells = ([row.name, _plain(row.nll, 4), *(_gap(row.gaps[name]) for name in schedules)] for row in rows)
    return [
        "## What training on the diagonal buys",
        "",
        *_text(
            "The shipped size, trained in different ways: NLL under NTP, and the gap of each schedule to it, "
            "nats per token. Fine-tuning starts from the first row; its control has as many steps of NTP, so "
            "that the gain is not just more training."
        ),
        "",
        *_table(("training", "NLL of NTP", *schedules), cells),
        "",
    ]


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
