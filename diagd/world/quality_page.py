"""The page on the quality of Diagonal Decoding, in Markdown."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from diagd.schedule import RowSeed
from diagd.world.evaluate import EvalOptions, Scores
from diagd.world.metrics import Estimate

SEEDS = (RowSeed.PREVIOUS_FRAME, RowSeed.ABOVE, RowSeed.DUPLICATE, RowSeed.PROMPT)


@dataclass(frozen=True)
class GapRow:
    """Likelihood gap to next-token prediction of one schedule under every row seed, and without refeeding."""

    name: str
    passes: int
    gaps: dict[str, Estimate]
    without_refeed: Estimate


def quality_page(
    gaps: list[GapRow],
    scores: list[Scores],
    drift: dict[str, Any],
    speeds: dict[str, float],
    evaluation: EvalOptions,
) -> str:
    """The page in Markdown."""
    lines = [
        "# Quality of Diagonal Decoding on the shipped world model",
        "",
        *_how(evaluation),
        "",
        "## Likelihood gap to next-token prediction, nats per token",
        "",
        _row("schedule", "passes", *(f"seed `{seed.value}`" for seed in SEEDS), "no refeed"),
        _row(*["---"] * (3 + len(SEEDS))),
        *map(_gap_cells, gaps),
        "",
        "## Rollouts",
        "",
        *_rollout_lines(scores, speeds),
        "",
        "![speed against quality](quality-speed.png)",
        "",
        "![truth, next-token prediction and diagonal schedules from the same prompt](quality-contact.png)",
        "",
        *_drift_lines(drift),
    ]
    return "\n".join(lines)


def _how(evaluation: EvalOptions) -> list[str]:
    sampling = evaluation.sampling
    text = (
        f"Likelihoods: {evaluation.windows} windows of {evaluation.window_frames} true frames of worlds the "
        f"model never saw, paired by window. Rollouts: {evaluation.rollouts}, each of {evaluation.prompt} "
        f"prompt frames and {evaluation.frames} generated ones, temperature {sampling.temperature:g}, top-p "
        f"{sampling.top_p:g}, the same random numbers for every schedule. Every figure is mean +- standard "
        "error. A difference of less than two standard errors is no difference; such gaps are in italics. "
        "The model was trained on a mixture of schedules with row seed `previous_frame` and refeeding, so "
        "the other columns show what it costs to decode otherwise than trained."
    )
    return textwrap.wrap(text, 110)


def _gap_cells(row: GapRow) -> str:
    seeds = (_gap(row.gaps[seed.value]) for seed in SEEDS)
    return _row(row.name, row.passes, *seeds, _gap(row.without_refeed))


def _rollout_lines(scores: list[Scores], speeds: dict[str, float]) -> list[str]:
    heads = (*_ROLLOUT_HEADS, "frames/s") if speeds else _ROLLOUT_HEADS
    last = {name: [f"{speed:.1f}"] for name, speed in speeds.items()}
    rows = (_row(*_rollout_cells(score), *last.get(score.name, [])) for score in scores)
    return [_row(*heads), _row(*["---"] * len(heads)), *rows]


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
    likelihood = _plain(score.generated_nll)
    return [
        score.name,
        score.passes,
        likelihood,
        *map(_plain, shown),
        *last,
        f"{truth.frechet.mean:.2f} +- {truth.frechet.error:.2f}",
    ]


def _drift_lines(drift: dict[str, Any]) -> list[str]:
    if not drift:
        return []
    names = ("walks_followed", "agreement", "invalid")
    return [
        "## Drift of long rollouts, k=1 chained",
        "",
        _row("up to frame", "walks followed", "tiles consistent", "invalid tiles"),
        _row(*["---"] * 4),
        *(
            _row(frame, *(_plain(Estimate(**scores[name])) for name in names))
            for frame, scores in zip(drift["frames"], drift["scores"], strict=True)
        ),
        "",
    ]


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _plain(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} +- {estimate.error:.3f}"


def _gap(estimate: Estimate) -> str:
    text = f"{estimate.mean:+.4f} +- {estimate.error:.4f}"
    return text if abs(estimate.mean) > 2 * estimate.error else f"*{text}*"
