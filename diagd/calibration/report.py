"""What a calibration did, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagd.bundle.files import atomic_file
from diagd.calibration.gate import Budget
from diagd.errors import DependencyError, require

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Report:
    """Figures of one calibration.

    Attributes:
        model, precision: what was done.
        range: rule for static activations; None without.
        seed: of the calibration run; the same seed gives the same scales.
        trajectories: what was decoded, for statistics and for the gate.
        figures: see ``Comparison.figures``.
        budget: what was allowed.
        failures: what is outside the budget.
        bytes_before, bytes_after: of the weights that the FP32 and the quantised prefix graph read.
        milliseconds: median step, FP32 and quantised, on this machine.
        agreement_by_width: share of equal predictions by rows of the step.
        layers: of each projection its error and what became of it.
        kv_cache: see ``describe_cache``; None where it stays in floating point.
    """

    model: str
    precision: str
    range: str | None
    seed: int
    trajectories: Sequence[Mapping[str, Any]]
    figures: Mapping[str, float | None]
    budget: Budget
    failures: Sequence[str]
    bytes_before: int
    bytes_after: int
    milliseconds: Mapping[str, float]
    agreement_by_width: Mapping[int, float]
    layers: Sequence[Mapping[str, Any]]
    kv_cache: Mapping[str, Any] | None = None

    @property
    def kept(self) -> list[str]:
        """Projections that stay in floating point."""
        return [layer["name"] for layer in self.layers if not layer["quantised"]]


def write_report(report: Report, directory: Path) -> None:
    """Write ``PRECISION.json`` and, where matplotlib is installed, ``PRECISION.png``."""
    with atomic_file(directory / f"{report.precision}.json") as partial:
        partial.write_text(json.dumps(asdict(report), indent=2) + "\n")
    try:
        require("matplotlib", extra="world", purpose="draw the error of every layer")
    except DependencyError:
        return  # the table says the same
    with atomic_file(directory / f"{report.precision}.png") as partial:
        _draw(report, partial)


def layer_table(report: Report) -> Table:
    """Error of every kind of projection, and of the worst single ones."""
    from rich.table import Table

    table = Table(title="Worst products")
    for heading in (
        "projection",
        "signal to noise",
        "divergence of its layer",
        "migration",
        "range",
        "stored as",
    ):
        table.add_column(heading)
    for layer in sorted(report.layers, key=lambda layer: float(layer["signal_to_noise"]))[:8]:
        table.add_row(
            layer["name"].removeprefix("transformer."),
            f"{layer['signal_to_noise']:.1f} dB",
            _number(layer.get("divergence"), 6),
            "-" if layer["alpha"] is None else f"{layer['alpha']:g}",
            "-" if layer["range"] is None else f"{layer['range']:.3g}",
            report.precision if layer["quantised"] else "floating point",
        )
    return table


def figure_table(report: Report) -> Table:
    """Quality against the budget, bytes and time."""
    from rich.table import Table

    table = Table("figure", "FP32", report.precision, "budget", title=f"{report.model} {report.precision}")
    figures, budget = report.figures, report.budget
    table.add_row("greedy agreement", "1", _number(figures["agreement"], 4), f"at least {budget.agreement:g}")
    table.add_row("NLL of FP32 tokens, rise", "0", _number(figures["nll"], 5), f"at most {budget.nll:g}")
    table.add_row("PSNR of frames, dB", "-", _number(figures["psnr"], 2), f"at least {budget.psnr:g}")
    table.add_row("divergence, nats", "0", _number(figures["divergence"], 6), "-")
    table.add_row(
        "weights read, MB", f"{report.bytes_before / 1e6:.1f}", f"{report.bytes_after / 1e6:.1f}", "-"
    )
    if report.kv_cache:
        before, after = (f"{report.kv_cache[f'bytes_{when}']:,}" for when in ("before", "after"))
        table.add_row("K/V bytes a token", before, after, "-")
        worst = min(report.kv_cache["signal_to_noise"].values())
        table.add_row("signal to noise of the worst K/V rows, dB", "-", _number(worst, 1), "-")
    times = report.milliseconds
    table.add_row("median step, ms", _number(times["fp32"], 2), _number(times["quantised"], 2), "-")
    table.add_row("products kept in FP32", str(len(report.layers)), str(len(report.kept)), "-")
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _draw(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    kinds = sorted({_kind(layer["name"]) for layer in report.layers})
    for kind in kinds:
        values = [layer["signal_to_noise"] for layer in report.layers if _kind(layer["name"]) == kind]
        axes.plot(range(len(values)), values, marker="o", label=kind)
    axes.set_xlabel("layer")
    axes.set_ylabel("signal to noise of the product, dB")
    axes.set_title(f"{report.model}, {report.precision}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def _kind(name: str) -> str:
    return ".".join(name.split(".")[-2:])
