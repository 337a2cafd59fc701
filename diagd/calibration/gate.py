"""What a quantised model may lose, whether figures are inside, and which products go back if they are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np

from diagd.calibration.report import Budget, LayerReport
from diagd.errors import UsageError, unknown

ATTEMPTS = 5
"""Runs of the gate; ahead of each but the first, products are given up."""

SETTLED_ERRORS = 2.0
"""Standard errors between a figure and its bound at which a verdict stands."""


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


def part_of(name: str) -> str:
    """The layer that a product belongs to: ``transformer.layers.3``; the head is ``transformer.head``."""
    return ".".join(name.split(".")[:3])


def most_harmful(layers: Sequence[LayerReport]) -> list[str]:
    """The fewest quantised products that make up half of the harm of them all, the worst first.

    The divergence that a layer causes alone is shared among its products by their noise; divergences of
    layers add up nearly, so that every call about halves what is left.
    """
    harms = _harms([layer for layer in layers if not layer.excluded])
    total, chosen = sum(harms.values()), list[str]()
    for name in sorted(harms, key=lambda name: (-harms[name], name)):
        if chosen and sum(harms[other] for other in chosen) >= total / 2:
            break
        chosen.append(name)
    return chosen


def _harms(layers: Sequence[LayerReport]) -> dict[str, float]:
    noises = {layer.name: 10 ** (-layer.signal_to_noise / 10) for layer in layers}
    sums: dict[str, float] = defaultdict(float)
    for name, noise in noises.items():
        sums[part_of(name)] += noise
    return {
        layer.name: (layer.divergence or 0.0) * noises[layer.name] / max(sums[part_of(layer.name)], 1e-30)
        for layer in layers
    }
