"""Pictures of rollouts beside each other, and of figures against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diagd.bundle.files import atomic_file


def save_contact_sheet(path: Path, rows: Mapping[str, NDArray[np.uint8]]) -> None:
    """Write a PNG with one row of frames uint8 [T, H, W, 3] for each label; all rows are equally long."""
    count = max(len(frames) for frames in rows.values())
    figure = Figure(figsize=(1.6 * count + 1.2, 1.25 * len(rows) + 0.3), dpi=110, layout="constrained")
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
    path: Path, series: Mapping[str, Sequence[tuple[str, float, float, float]]], across: str, up: str
) -> None:
    """Write a PNG with points (label, x, y, standard error of y) of each series; x is logarithmic."""
    figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
    axis = figure.subplots()
    for name, points in series.items():
        _, x, y, error = zip(*points, strict=True)
        axis.errorbar(x, y, yerr=error, fmt="o", capsize=3, label=name)
        for label, across_point, up_point, _ in points:
            place = (across_point, up_point)
            axis.annotate(label, place, textcoords="offset points", xytext=(5, 4), fontsize=7)
    axis.set(xlabel=across, ylabel=up, xscale="log")
    axis.grid(alpha=0.3)
    if series:
        axis.legend()
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")
