"""The page on the quality of Diagonal Decoding, in Markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence

from benchmarks import markdown_table as _table
from benchmarks.quality.decoders import DecoderFigures
from benchmarks.quality.figures import SEEDS, CompatRow, Figures, GapRow, SizeFigures, TrainingRow
from benchmarks.quality.questions import QUESTIONS, World, difference, gap, plain
from diagd.tuning.prefer import TUNED, PreferReport
from diagd.tuning.reward import Change
from worlds.evaluate import Drift, Judgement, Scores
from worlds.metrics import Estimate
from worlds.options import EvalOptions

CONTACT = "truth, next-token prediction and diagonal schedules from the same prompt"


def quality_page(figures: Figures, shipped_size: str, shipped_world: str = "crafter-3m") -> str:
    """The page in Markdown; the shipped model has a name among the sizes, and one among the worlds."""
    sections = _section("# Quality of Diagonal Decoding", _how(figures.options))
    sections += _question_lines(World.all(figures, shipped_world, shipped_size))
    if figures.shipped:
        speeds = figures.frames_per_second.get(shipped_size, {})
        sections += _shipped_lines(figures.shipped, speeds)
    for world, its in figures.worlds.items():
        sections += _world_lines(world, its)
    for world, found in figures.decoders.items():
        sections += _decoder_lines(world, found)
    sections += _compat_lines(figures.compat)
    sections += _size_lines(figures)
    for world, rows in figures.training.items():
        sections += _training_lines(world, rows)
    for world, report in figures.preferences.items():
        sections += _preference_lines(world, report)
    return "\n".join(sections)


def _question_lines(worlds: list[World]) -> list[str]:
    answered = {question: [of(world) for world in worlds] for question, of in QUESTIONS.items()}
    rows = [[question, *answers] for question, answers in answered.items() if any(answers)]
    if not rows:
        return []
    return _section(
        "## What is asked, and what each world answers",
        _text(
            "Gaps are to next-token prediction, nats per token, with row seed `previous_frame` and refeeding "
            "where nothing else is said. The sections below have the rest."
        ),
        _table(("question", *(world.name for world in worlds)), rows),
    )


def _how(evaluation: EvalOptions) -> list[str]:
    sampling = evaluation.sampling
    return _text(
        f"Likelihoods: {evaluation.windows} windows of {evaluation.window_frames} true frames of worlds that "
        f"no model saw, paired by window. Rollouts: {evaluation.rollouts}, each of {evaluation.prompt} "
        f"prompt frames and {evaluation.frames} generated ones, temperature {sampling.temperature:g}, top-p "
        f"{sampling.top_p:g}, the same random numbers for every schedule. Every figure is mean +- standard "
        "error. A difference of less than two standard errors is no difference; such gaps are in italics. "
        "NTP: next-token prediction, one token a pass."
    )


def _shipped_lines(shipped: SizeFigures, speeds: dict[str, float]) -> list[str]:
    trained = (
        "The model was trained on a mixture of schedules with row seed `previous_frame` and refeeding; "
        "the other columns show what it costs to decode otherwise than trained."
    )
    pictures = [["![speed against quality](quality-speed.png)"], [f"![{CONTACT}](quality-contact.png)"]]
    rollouts = [_rollout_lines(shipped.schedules, speeds), _noise_lines(shipped.schedules), *pictures]
    return _model_lines("The shipped model", trained, shipped, rollouts)


def _world_lines(world: str, figures: SizeFigures) -> list[str]:
    scores = figures.schedules
    count = f"Next-token prediction: {plain(scores[0].nll)}, {scores[0].nll.count} windows."
    rolled = _text(f"{scores[0].generated_nll.count} rollouts.")
    return _model_lines(world, count, figures, [rolled, _rollout_lines(scores, {}), _noise_lines(scores)])


def _model_lines(model: str, told: str, figures: SizeFigures, rollouts: list[list[str]]) -> list[str]:
    gaps = f"## {model}: likelihood gap to next-token prediction, nats per token"
    return [
        *_section(gaps, _text(told), _gap_table(figures.gaps)),
        *_section(f"## {model}: rollouts", *rollouts),
        *_drift_lines(model, figures.drift),
    ]


def _gap_table(rows: list[GapRow]) -> list[str]:
    heads = ("schedule", "passes", *(f"seed `{seed.value}`" for seed in SEEDS), "no refeed")
    cells = (
        [row.name, row.passes, *(gap(row.gaps[seed.value]) for seed in SEEDS), gap(row.without_refeed)]
        for row in rows
    )
    return _table(heads, cells)


_Figures = dict[str, tuple[Callable[[Scores], Estimate | None], int]]

_FIGURES: _Figures = {
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

_AGREEING = _FIGURES | {"as NTP": (lambda score: score.ntp_match, 3)}


def _known(scores: Iterable[Scores], figures: _Figures = _FIGURES) -> dict[str, tuple[list[Estimate], int]]:
    """Those that every schedule has, in the order of the schedules, each with its digits."""
    found = {label: ([of(score) for score in scores], digits) for label, (of, digits) in figures.items()}
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
        [score.name, score.passes, *(plain(row[n], digits) for row, digits in known.values())]
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
    rows = ([frame, *(plain(c[n]) for c in known.values())] for n, frame in enumerate(drift.frames))
    return _section(f"## {model}: drift of long rollouts, k=1 chained", _table(("up to frame", *known), rows))


def _compat_lines(sizes: dict[str, list[CompatRow]]) -> list[str]:
    if not sizes:
        return []
    windows = max(row.aligned.count for rows in sizes.values() for row in rows)
    heads = (
        "world or size",
        "schedule",
        "seed `previous_frame`, refeed",
        "seed `duplicate`, no refeed",
        '`compat="mineworld"`',
    )
    cells = (
        [size, row.name, *map(gap, (row.aligned, row.strict, row.released))]
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
        gaps = ([s.name, plain(s.nll, 4), gap(s.nll_gap)] for s in scores)
        lines += _section(
            f"### {title}, {scores[0].generated_nll.count} rollouts",
            _table(("schedule", "NLL", "gap"), gaps),
            _gap_table(size.gaps) if size.gaps else ["Other row seeds were not measured here."],
            _rollout_lines(scores, speeds),
            _noise_lines(scores),
        )
    return lines


def _training_lines(world: str, rows: list[TrainingRow]) -> list[str]:
    schedules = list(rows[0].gaps)
    cells = ([row.name, plain(row.nll, 4), *(gap(row.gaps[name]) for name in schedules)] for row in rows)
    return _section(
        f"## What training on the diagonal buys: {world}",
        _text(
            f"The shipped size, trained in different ways: NLL under NTP ({rows[0].nll.count} windows), and "
            "the gap of each schedule to it, nats per token. Fine-tuning starts from the first row; its "
            "control has as many steps of NTP, so that the gain is not just more training."
        ),
        _table(("training", "NLL of NTP", *schedules), cells),
        *_trained_rollouts([(row.name, score) for row in rows for score in row.schedules]),
    )


def _trained_rollouts(scores: list[tuple[str, Scores]]) -> list[list[str]]:
    if not scores:
        return []
    known = _known([score for _, score in scores], _AGREEING)
    rows = (
        [name, score.name, *(plain(row[n], digits) for row, digits in known.values())]
        for n, (name, score) in enumerate(scores)
    )
    told = _text(
        f"{scores[0][1].generated_nll.count} rollouts of each; NLL is under the model's own NTP, `as NTP` "
        "the share of tokens that its own NTP draws too, with the same random numbers."
    )
    return [told, _table(("training", "schedule", *known), rows)]


def _preference_lines(world: str, report: PreferReport) -> list[str]:
    verdicts, choice = report.verdicts, report.choice
    figures = list(next(iter(verdicts.values())).changes)
    rows = (
        [TUNED[way], *(_change(name, verdict.changes[name]) for name in figures), _told(verdict.breaches)]
        for way, verdict in verdicts.items()
    )
    chosen = "none is better, and nothing is written" if report.chosen is None else TUNED[report.chosen]
    return _section(
        f"## Preferences between rollouts: {world}",
        _text(
            f"`diagd prefer`: {report.pairs} pairs of {report.contexts} contexts, rolled out by "
            f"{report.decoder}; three ways to spend the same steps, judged on contexts that were held out, "
            "over three seeds: before -> after [95 % interval of the difference]. Chosen: "
            f"{chosen}. Scores of the rollouts of a context agree with those by the gate's probe to "
            f"{choice.agreement:.2f} (correlation; 1 is no noise of the probe). What has to rise is "
            f"{choice.gained.before:.4f} of all rollouts, {choice.gained.after:.4f} of the best of each "
            f"context ({difference(choice.gained)}), and {choice.truth:.4f} of the true frames that followed."
        ),
        _table(("trained on", *(_HEADS.get(name, name) for name in figures), "gate"), rows),
    )


_HEADS = {"truth": "NLL of true frames (interval: of the relative rise)"}


def _told(breaches: Sequence[str]) -> str:
    return "; ".join(breaches) or "passed"


def _change(name: str, change: Change) -> str:
    digits = "+.2%" if name == "truth" else "+.4f"
    return f"{change.before:.4f} -> {change.after:.4f} [{change.low:{digits}}, {change.high:{digits}}]"


def decoders_plot(world: str) -> str:
    """Name of the picture of a world's decoders."""
    return f"quality-decoders-{world}.png"


_JUDGED: dict[str, Callable[[Judgement], Estimate | None]] = {
    "NLL under NTP": lambda judgement: judgement.generated_nll,
    "as NTP": lambda judgement: judgement.ntp_match,
    "match, last frame": lambda judgement: judgement.truth.match[-1],
    "action followed": lambda judgement: judgement.geometry.followed if judgement.geometry else None,
    "tiles consistent": lambda judgement: judgement.geometry.agreement if judgement.geometry else None,
}


def _judged(judgement: Judgement) -> list[str]:
    found = (of(judgement) for of in _JUDGED.values())
    return ["" if estimate is None else plain(estimate) for estimate in found]


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
        _table(("temperature", *figures.passes), [("passes", *map(plain, figures.passes.values()))]),
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
