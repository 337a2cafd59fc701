"""Whether a quantised graph may replace the reference: both decode the same trajectories, side by side.

The reference decides which tokens come next, so that one early difference does not spoil what follows;
the candidate predicts every one of them from its own cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Float
from diagd.errors import UsageError, unknown

SETTLED_ERRORS = 2.0
"""Standard errors between a figure and its bound at which a verdict stands."""


@dataclass(frozen=True)
class Budget:
    """What a quantised model may lose.

    Attributes:
        agreement: smallest share of predictions whose most probable token is that of FP32.
        nll: largest relative rise of the NLL of tokens that the FP32 model draws.
        psnr: smallest PSNR of all frames of most probable tokens against those of FP32, dB.
    """

    agreement: float = 0.97
    nll: float = 0.01
    psnr: float = 30.0


def parse_budget(text: str, default: Budget) -> Budget | None:
    """``agreement=0.97,nll=0.01,psnr=30``, any of them; ``none`` is None.

    Raises:
        UsageError: a name or number is wrong.
    """
    if text == "none":
        return None
    names = [entry.name for entry in fields(Budget)]
    values = {name: float(getattr(default, name)) for name in names}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if name not in names:
            raise unknown("budget", name, names)
        try:
            values[name] = float(value)
        except ValueError:
            raise UsageError(f"--budget {pair}: expected NAME=NUMBER") from None
        if not equals or not np.isfinite(values[name]):
            raise UsageError(f"--budget {pair}: expected NAME=NUMBER")
    return Budget(**values)


@dataclass
class Block:
    """Sums over the predictions of one trajectory; each has a prompt of its own, so their spread is known."""

    rows: int = 0
    agreed: int = 0
    nll: float = 0.0
    divergence: float = 0.0


@dataclass
class WidthFigures:
    """What steps of one width gave: predictions, equal ones, and seconds of each step."""

    rows: int = 0
    agreed: int = 0
    reference: list[float] = field(default_factory=list)
    quantised: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    """Sums over the predictions of a comparison, block by block.

    ``nll`` is the expected negative log-likelihood, nats, of tokens that the reference draws under the
    reference itself; ``divergence`` is what it rises by under the candidate. Both are exact sums over the
    allowed ids, so that no draw adds noise. ``frame_errors`` are mean squared errors of frames of most
    probable tokens.
    """

    blocks: list[Block] = field(default_factory=lambda: [Block()])
    frame_errors: list[float] = field(default_factory=list)
    by_width: dict[int, WidthFigures] = field(default_factory=dict)

    def begin(self) -> None:
        """What follows belongs to another block."""
        if self.blocks[-1].rows:
            self.blocks.append(Block())

    def add(self, reference: Float, candidate: Float, width: int) -> None:
        """Take the logits [R, V] of allowed ids of one step of ``width`` rows."""
        p_log, q_log = log_softmax(reference), log_softmax(candidate)
        agreed = int((reference.argmax(1) == candidate.argmax(1)).sum())
        p, block = np.exp(p_log), self.blocks[-1]
        block.rows += len(reference)
        block.agreed += agreed
        block.nll -= float((p * p_log).sum())
        block.divergence += float((p * (p_log - q_log)).sum())
        figures = self.by_width.setdefault(width, WidthFigures())
        figures.rows += len(reference)
        figures.agreed += agreed

    def figures(self) -> dict[str, float | None]:
        """Measured values by name, with standard errors; PSNR is None without decoded frames."""
        rows, agreed, nll, divergence = np.asarray(
            [(b.rows, b.agreed, b.nll, b.divergence) for b in self.blocks], np.float64
        ).T
        count = max(float(rows.sum()), 1.0)
        error = float(np.mean(self.frame_errors)) if self.frame_errors else None
        return {
            "agreement": float(agreed.sum()) / count,
            "agreement_error": ratio_error(agreed, rows),
            "nll": float(divergence.sum()) / max(float(nll.sum()), 1e-30),
            "nll_error": ratio_error(divergence, nll),
            "psnr": None if error is None else 10 * float(np.log10(255**2 / max(error, 1e-6))),
            "fp32_nll": float(nll.sum()) / count,
            "divergence": float(divergence.sum()) / count,
            "predictions": float(rows.sum()),
        }


def ratio_error(over: NDArray[np.float64], under: NDArray[np.float64]) -> float:
    """Standard error of sum(over) / sum(under), each [B] by block: the ratio estimator of surveys."""
    total, count = float(under.sum()), len(over)
    if count < 2 or total <= 0:
        return 0.0
    residuals = over - float(over.sum()) / total * under
    return float(np.sqrt(count / (count - 1) * np.square(residuals).sum())) / total


def failures(figures: Mapping[str, float | None], budget: Budget) -> list[str]:
    """What is outside the budget, in words; agreement and NLL must be inside by one standard error."""
    found = []
    agreement, nll, psnr = (figures[name] for name in ("agreement", "nll", "psnr"))
    agreement_error, nll_error = figures["agreement_error"] or 0.0, figures["nll_error"] or 0.0
    if agreement is None or not agreement - agreement_error >= budget.agreement:
        found.append(
            f"agreement {agreement:.4f} +- {agreement_error:.4f} is not safely above {budget.agreement:g}"
        )
    if nll is None or not nll + nll_error <= budget.nll:
        found.append(f"NLL rises by {nll:.4f} +- {nll_error:.4f}, allowed is {budget.nll:g}")
    if psnr is not None and not psnr >= budget.psnr:
        found.append(f"PSNR {psnr:.2f} dB is below {budget.psnr:g}")
    return found


def is_settled(figures: Mapping[str, float | None], budget: Budget) -> bool:
    """Whether more predictions would hardly change the verdict: no bound is within two standard errors."""
    distances = (
        (figures["agreement"], figures["agreement_error"], budget.agreement),
        (figures["nll"], figures["nll_error"], budget.nll),
    )
    return all(
        value is not None and error is not None and not abs(value - bound) < SETTLED_ERRORS * error
        for value, error, bound in distances
    )


def log_softmax(logits: Float) -> NDArray[np.float64]:
    """Natural logarithms of probabilities, float64 [R, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
