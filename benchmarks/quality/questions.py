"""What is asked of Diagonal Decoding, and the answers of several worlds side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.quality.decoders import DecoderFigures
from benchmarks.quality.figures import CompatRow, Figures, SizeFigures, TrainingRow
from diagd.schedule import RowSeed
from diagd.tuning.prefer import PreferReport
from diagd.tuning.reward import Change
from worlds.metrics import Estimate

FAST = "k=1 chained"


@dataclass(frozen=True)
class World:
    """All that was measured of one world; a part that was not is empty."""

    name: str
    figures: SizeFigures | None
    decoders: DecoderFigures | None
    training: list[TrainingRow]
    preferences: PreferReport | None
    compat: list[CompatRow]

    @classmethod
    def all(cls, figures: Figures, shipped: str, size: str) -> list[World]:
        """The shipped one, which has a name among the sizes too, and the others."""
        known = {shipped: figures.shipped, **figures.worlds}
        return [
            cls(
                name,
                its,
                figures.decoders.get(name),
                figures.training.get(name, []),
                figures.preferences.get(name),
                figures.compat.get(size if name == shipped else name, []),
            )
            for name, its in known.items()
        ]

    def gap(self, schedule: str, seed: RowSeed = RowSeed.PREVIOUS_FRAME) -> str:
        """Of a schedule; nothing where it was not measured."""
        rows = {row.name: row for row in self.figures.gaps} if self.figures else {}
        return gap(rows[schedule].gaps[seed.value]) if schedule in rows else ""


def _certainty(world: World) -> str:
    return plain(world.figures.schedules[0].nll) if world.figures else ""


def _passes(world: World) -> str:
    passes = {score.name: score.passes for score in world.figures.schedules} if world.figures else {}
    if FAST not in passes:
        return ""
    most = max(passes.values())
    return f"{most} -> {passes[FAST]}: {most / passes[FAST]:.1f} times"


def _speed(world: World) -> str:
    if world.decoders is None:
        return ""
    rates = {point.name: point.frames_per_second[0] for point in world.decoders.points}
    slow, fast = rates["next token"], rates[FAST]
    return f"{slow:.1f} -> {fast:.1f} frames/s: {fast / slow:.1f} times"


def _cost(*schedules: str) -> Callable[[World], str]:
    return lambda world: _listed({name: world.gap(name) for name in schedules})


def _seeds(world: World) -> str:
    return _listed({f"`{seed.value}`": world.gap(FAST, seed) for seed in RowSeed})


def _refeeding(world: World) -> str:
    rows = [row for row in world.figures.gaps if row.name == FAST] if world.figures else []
    return gap(rows[0].without_refeed) if rows else ""


def _released(world: World) -> str:
    return next((gap(row.released) for row in world.compat if row.name == FAST), "")


def _training(world: World) -> str:
    return _listed({row.name: gap(row.gaps[FAST]) for row in world.training})


def _jacobi(world: World) -> str:
    found = world.decoders.passes if world.decoders else {}
    return _listed({f"temperature {heat}": plain(passes, 1) for heat, passes in found.items()})


def _precisions(world: World) -> str:
    judged = world.decoders.precisions if world.decoders else {}
    return _listed({name: plain(seen.generated_nll) for name, seen in judged.items()})


def _preferences(world: World) -> str:
    if world.preferences is None:
        return ""
    aim = "followed" if world.preferences.probe else "score"
    changes = {way: difference(verdict.changes[aim]) for way, verdict in world.preferences.verdicts.items()}
    return f"{'no' if world.preferences.chosen is None else 'yes'}; {aim}: {_listed(changes)}"


QUESTIONS: dict[str, Callable[[World], str]] = {
    "How certain are its tokens? NLL of next-token prediction, nats": _certainty,
    "How many passes does k = 1 chained save, over 4 frames?": _passes,
    "How much faster is it, on one core?": _speed,
    "What does it cost?": _cost(FAST),
    "Does a larger row lag k cost less?": _cost("k=2 chained", "k=4 chained"),
    "Is it the overlap of frames (d) that costs? Without it": _cost("k=1 serial"),
    "Which token stands in for the one before a row?": _seeds,
    "What if true row ends are never fed?": _refeeding,
    "And if the cache is that of the released code (`compat`)?": _released,
    "Does training for the order close the gap, beside as many steps without it? k = 1 chained": _training,
    "How many passes a frame does exact decoding (Jacobi) take?": _jacobi,
    "What do fewer bits cost? NLL of rollouts under float32": _precisions,
    "Does tuning to preferences between its own rollouts help?": _preferences,
}
"""What is asked, and who answers: nothing where it was not measured."""


def _listed(found: dict[str, str]) -> str:
    known = {name: text for name, text in found.items() if text}
    return (
        next(iter(known.values())) if len(found) == 1 and known else "; ".join(map(": ".join, known.items()))
    )


def difference(change: Change) -> str:
    """What it is, with its interval."""
    return f"{change.after - change.before:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"


def plain(estimate: Estimate, digits: int = 3) -> str:
    """With its standard error."""
    return f"{estimate.mean:.{digits}f} +- {estimate.error:.{digits}f}"


def gap(estimate: Estimate) -> str:
    """Likewise, with its sign; in italics where it is less than two standard errors."""
    text = f"{estimate.mean:+.4f} +- {estimate.error:.4f}"
    return text if abs(estimate.mean) > 2 * estimate.error else f"*{text}*"
