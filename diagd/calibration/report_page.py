"""A calibration's report for people: tables on the terminal, and a plot of every product's error."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from diagd.bundle.files import atomic_file
from diagd.calibration.report import PrecisionReport, WidthReport

if TYPE_CHECKING:
    from rich.table import Table

WORST = 8


def layer_table(report: PrecisionReport) -> Table:
    """The products that stay in floating point, and the worst of the others."""
    from rich.table import Table

    table = Table(title="Worst products")
    for heading in (
        "product",
        "signal to noise",
        "divergence of its layer",
        "migration",
        "range",
        "stored as",
    ):
        table.add_column(heading)
    ranked = sorted(report.layers, key=lambda layer: (layer.excluded is None, layer.signal_to_noise))
    for layer in ranked[: max(WORST, len(report.excluded))]:
        table.add_row(
            layer.name.removeprefix("transformer.").removeprefix("layers."),
            f"{layer.signal_to_noise:.1f} dB",
            _number(layer.divergence, 6),
            "-" if layer.alpha is None else f"{layer.alpha:g}",
            "-" if layer.range is None else f"{layer.range:.3g}",
            f"floating point ({layer.excluded})" if layer.excluded else report.precision,
        )
    return table


def figure_table(model: str, report: PrecisionReport) -> Table:
    """Quality against the budget, bytes and time."""
    from rich.table import Table

    headings = ("figure", report.reference, report.precision, "budget")
    table = Table(*headings, title=f"{model} {report.precision}")
    figures, budget = report.figures, report.budget
    if budget is not None:
        agreement, nll = (
            f"{_number(figures[name], 5)} +- {_number(figures[f'{name}_error'], 5)}"
            for name in ("agreement", "nll")
        )
        table.add_row("greedy agreement", "1", agreement, f"at least {budget.agreement:g}")
        table.add_row("NLL of the reference's tokens, rise", "0", nll, f"at most {budget.nll:g}")
        table.add_row("PSNR of frames, dB", "-", _number(figures["psnr"], 2), f"at least {budget.psnr:g}")
        table.add_row("divergence, nats", "0", _number(figures["divergence"], 6), "-")
        table.add_row("predictions", "-", f"{figures['predictions'] or 0:,.0f}", "-")
    before, after = (f"{count / 1e6:.1f}" for count in (report.bytes_before, report.bytes_after))
    table.add_row("weights read, MB", before, after, "-")
    if report.kv_cache:
        cache = report.kv_cache
        table.add_row("K/V bytes a token", f"{cache.bytes_before:,}", f"{cache.bytes_after:,}", "-")
        worst = min(cache.signal_to_noise.values())
        table.add_row("signal to noise of the worst K/V rows, dB", "-", _number(worst, 1), "-")
    for width, seen in _common_widths(report):
        times = (f"{ms:.2f}" for ms in (seen.milliseconds_before, seen.milliseconds_after))
        table.add_row(f"step of {width} rows, ms", *times, "-")
    table.add_row("products in floating point", str(len(report.layers)), str(len(report.excluded)), "-")
    for form, reason in report.left_out.items():
        table.add_row(f"{form} graph", "-", "left out", reason)
    return table


def _common_widths(report: PrecisionReport) -> list[tuple[int, WidthReport]]:
    """The narrowest, the most common and the widest width."""
    if not report.widths:
        return []
    common = max(report.widths, key=lambda width: report.widths[width].predictions)
    return [
        (width, report.widths[width]) for width in sorted({min(report.widths), common, max(report.widths)})
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def write_plot(model: str, report: PrecisionReport, directory: Path) -> None:
    """Write ``PRECISION.png`` where matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return  # the table says the same
    with atomic_file(directory / f"{report.precision}.png") as partial:
        _draw(model, report, partial)


def _draw(model: str, report: PrecisionReport, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    kinds = sorted({_kind(layer.name) for layer in report.layers})
    for kind in kinds:
        values = [layer.signal_to_noise for layer in report.layers if _kind(layer.name) == kind]
        axes.plot(range(len(values)), values, marker="o", label=kind)
    axes.set_xlabel("layer")
    axes.set_ylabel("signal to noise of the product, dB")
    axes.set_title(f"{model}, {report.precision}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def _kind(name: str) -> str:
    return ".".join(name.split(".")[-2:])
