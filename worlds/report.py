"""Figures of an evaluation as JSON, as a table, and as pictures of rollouts beside each other."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json
from rich.table import Table

from diagd.bundle.files import atomic_file, write_text
from worlds.evaluate import Scores
from worlds.metrics import Estimate


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that every program reads: null where a figure is none, which JSON has no NaN for."""
    write_text(path, to_json(content, indent=1, inf_nan_mode="null").decode() + "\n")


def write_scores(path: Path, scores: Sequence[Scores], extra: dict[str, Any]) -> None:
    """Write the figures as JSON, with ``extra`` entries beside them."""
    write_json(path, {"schedules": list(scores)} | extra)


def write_figures(folder: Path, figures: Mapping[str, Estimate], extra: dict[str, Any]) -> None:
    """Write figures by name as eval.json, with ``extra`` entries beside them, and as eval.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: asdict(figure) for name, figure in figures.items()}
    write_json(folder / "eval.json", {"figures": rows} | extra)
    with atomic_file(folder / "eval.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ("figure", "mean", "error", "count"))
        table.writeheader()
        table.writerows({"figure": name, **row} for name, row in rows.items())


def figures_table(figures: Mapping[str, Estimate]) -> Table:
    """Figures by name for the console, each with its standard error, and the samples behind it."""
    table = Table("figure", "mean +- standard error", "of")
    for name, figure in figures.items():
        value = f"{figure.mean:.4f}" if np.isnan(figure.error) else _cell(figure)
        table.add_row(name, value, str(figure.count))
    return table


def scores_table(scores: Sequence[Scores]) -> Table:
    """The figures as a table for the console, each with its standard error."""
    judged = ("followed", "walks", "invalid", "recovered", "as NTP", "last match", "dynamics", "Frechet")
    heads = ("NLL", "gap to NTP", "generated NLL", *judged)
    table = Table("schedule", "passes", *heads, title="mean +- standard error")
    for score in scores:
        geometry, truth = score.geometry, score.truth
        rules = (geometry.followed, geometry.walks_followed, geometry.invalid) if geometry else (None,) * 3
        likelihoods = (score.nll, score.nll_gap, score.generated_nll)
        others = (score.recovered, score.ntp_match, truth.match[-1], truth.dynamics, truth.frechet)
        figures = (*likelihoods, *rules, *others)
        table.add_row(score.name, str(score.passes), *map(_cell, figures))
    return table


def _cell(estimate: Estimate | None) -> str:
    return f"{estimate.mean:.4f} +- {estimate.error:.4f}" if estimate else "-"


def save_contact_sheet(path: Path, rows: Mapping[str, NDArray[np.uint8]]) -> None:
    """Write a PNG with one row of frames uint8 [T, H, W, 3] for each label; all rows are equally long."""
    from matplotlib.figure import Figure

    count = max(len(frames) for frames in rows.values())
    size = (1.6 * count + 1.2, 1.25 * len(rows) + 0.3)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for line, (label, frames) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(label, fontsize=8)
        for axis, frame in zip(line, frames, strict=False):
            axis.imshow(frame, interpolation="nearest")
    for n, axis in enumerate(axes[0]):
        axis.set_title(f"frame {n}", fontsize=8)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")
