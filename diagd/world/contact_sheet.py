"""Pictures of rollouts beside each other, and of figures against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.files import atomic_file
from diagd.errors import require


def save_contact_sheet(path: Path, rows: Mapping[str, NDArray[np.uint8]]) -> None:
    """Write a PNG with one row of frames uint8 [T, H, W, 3] for each label; all rows are equally long."""
    figures = _figures()
    count = max(len(frames) for frames in rows.values())
    figure = figures.Figure(
        figsize=(1.6 * count + 1.2, 1.25 * len(rows) + 0.3), dpi=110, layout="constrained"
    )
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (label, frames) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(label, fontsize=8)
        for n, frame in enumerate(frames):
            line[n].imshow(frame, interpolation="nearest")
    for n, axis in enumerate(axes[0]):
        axis.set_title(f"frame {n}", fontsize=8)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")


def save_plot(
    path: Path,
    points: Sequence[tuple[str, float, float, float]],
    across: str,
    up: str,
    *,
    logarithmic: bool = True,
) -> None:
    """Write a PNG with labelled points (label, x, y, standard error of y)."""
    figure = _figures().Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axis = figure.subplots()
    for label, x, y, error in points:
        axis.errorbar(x, y, yerr=error, fmt="o", capsize=3)
        axis.annotate(label, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axis.set(xlabel=across, ylabel=up, xscale="log" if logarithmic else "linear")
    axis.grid(alpha=0.3)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")


def _figures() -> ModuleType:
    return require("matplotlib.figure", extra="world", purpose="draw pictures")
