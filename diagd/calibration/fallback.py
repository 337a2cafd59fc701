"""Which products go back to floating point when the whole model is outside its budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from diagd.calibration.report import LayerReport

ROUNDS = 4
"""Times that products are given up before a scheme is."""


def part_of(name: str) -> str:
    """The layer that a product belongs to: ``transformer.layers.3``; the head is ``transformer.head``."""
    return ".".join(name.split(".")[:3])


def most_harmful(layers: Sequence[LayerReport]) -> list[str]:
    """The fewest quantised products that make up half of the harm of them all, the worst first.

    The divergence that a layer causes alone is shared among its products by their noise; divergences of
    layers add up nearly, so that every call about halves what is left.
    """
    harms = _harms([layer for layer in layers if not layer.kept])
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
