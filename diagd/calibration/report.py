"""What calibrations did: the schema of ``calibration/report.json``, and tables and a plot of it."""

from __future__ import annotations

from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationError

from diagd.bundle.files import atomic_file, write_text
from diagd.calibration.options import Budget
from diagd.errors import BundleError, fault
from diagd.options import Frozen

if TYPE_CHECKING:
    from rich.table import Table


REPORT_VERSION = 2
REPORT_NAME = "report.json"

Figures = dict[str, float | None]

WORST = 8


class LayerReport(Frozen):
    """One product with a constant weight.

    Attributes:
        name, inputs, outputs: of its weight.
        signal_to_noise: of its product on calibration rows, dB.
        divergence: nats by which predictions move when its layer alone is quantised; None: not measured.
        alpha: of the migration; None without.
        range: largest activation that is told apart; None where activations stay in floating point.
        excluded: why it stays in floating point: ``floor`` or ``gate``; None where it is quantised.
    """

    name: str
    inputs: int
    outputs: int
    signal_to_noise: float
    divergence: float | None = None
    alpha: float | None = None
    range: float | None = None
    excluded: str | None = None


class TrajectoryReport(Frozen):
    """What was decoded: passes of the run that finds ranges, and of one round of the gate."""

    name: str
    k: int
    d: int
    steps: int


class WidthReport(Frozen):
    """Steps of one width: share of equal predictions, and median milliseconds of each engine alone."""

    predictions: int
    agreement: float
    milliseconds_before: float
    milliseconds_after: float


class AttemptReport(Frozen):
    """One run of the gate: how many products stay in floating point, and the figures (and ``psnr``)."""

    excluded: int
    figures: Figures
    failures: tuple[str, ...]


class CacheReport(Frozen):
    """K/V rows of 8 bits: bytes a token before and after, and signal to noise of each buffer's rows, dB."""

    dtype: str
    bytes_before: int
    bytes_after: int
    signal_to_noise: dict[str, float]


class PrecisionReport(Frozen):
    """One calibration.

    Attributes:
        precision, reference: of the graphs that were made, and of those they are compared with.
        seed, gate_seed: of the run that finds ranges, and of the comparison.
        budget: None where nothing was judged.
        attempts: runs of the gate; each but the first left more products in floating point.
        bytes_before, bytes_after: of the weights that a step reads.
        widths: by rows of the step.
        forms: form to the files of its graphs.
        left_out: form to why it has no graph.
        kv_cache: None where it stays in floating point.
    """

    precision: str
    reference: str
    seed: int
    gate_seed: int
    trajectories: tuple[TrajectoryReport, ...]
    budget: Budget | None
    attempts: tuple[AttemptReport, ...]
    bytes_before: int
    bytes_after: int
    widths: dict[int, WidthReport]
    forms: dict[str, str] = Field(default_factory=dict)
    left_out: dict[str, str] = Field(default_factory=dict)
    layers: tuple[LayerReport, ...]
    kv_cache: CacheReport | None = None

    @property
    def figures(self) -> Figures:
        """Of the last attempt; none where nothing was judged."""
        return self.attempts[-1].figures if self.attempts else {}

    @property
    def failures(self) -> tuple[str, ...]:
        """What is outside the budget."""
        return self.attempts[-1].failures if self.attempts else ()

    @property
    def excluded(self) -> list[str]:
        """Products that stay in floating point."""
        return [layer.name for layer in self.layers if layer.excluded]


class CalibrationReport(Frozen):
    """The whole of ``report.json``: an entry for each precision."""

    schema_version: Annotated[int, Field(ge=1, le=REPORT_VERSION)] = REPORT_VERSION
    model: str
    precisions: dict[str, PrecisionReport] = Field(default_factory=dict)


def read_calibration(directory: Path) -> CalibrationReport | None:
    """What a ``calibration`` directory reports, if anything; BundleError: damaged, or of a later version."""
    file = directory / REPORT_NAME
    if not file.is_file():
        return None
    try:
        return CalibrationReport.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise BundleError(f"{file}: field {fault(error)}; calibrate a fresh export") from error


def add_report(directory: Path, model: str, report: PrecisionReport) -> None:
    """Write the report of a precision beside those of others."""
    known = read_calibration(directory) or CalibrationReport(model=model)
    whole = known.model_copy(update={"precisions": {**known.precisions, report.precision: report}})
    write_text(directory / REPORT_NAME, whole.model_dump_json(indent=2) + "\n")


def layer_table(report: PrecisionReport) -> Table:
    """The products that stay in floating point, and the worst of the others."""
    from rich.table import Table

    headings = ("product", "signal to noise", "divergence of its layer", "migration", "range", "stored as")
    table = Table(*headings, title="Worst products")
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
    if widths := report.widths:
        common = max(widths, key=lambda width: widths[width].predictions)
        for width in sorted({min(widths), common, max(widths)}):
            times = widths[width].milliseconds_before, widths[width].milliseconds_after
            table.add_row(f"step of {width} row{'s' * (width > 1)}, ms", *(f"{ms:.2f}" for ms in times), "-")
    table.add_row("products in floating point", str(len(report.layers)), str(len(report.excluded)), "-")
    for form, reason in report.left_out.items():
        table.add_row(f"{form} graph", "-", "left out", reason)
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def write_plot(model: str, report: PrecisionReport, directory: Path) -> None:
    """Write ``PRECISION.png`` where matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return  # the table says the same
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes, kinds = figure.subplots(), defaultdict[str, list[float]](list)
    for layer in report.layers:
        kinds[".".join(layer.name.split(".")[-2:])].append(layer.signal_to_noise)
    for kind, values in sorted(kinds.items()):
        axes.plot(range(len(values)), values, marker="o", label=kind)
    title = f"{model}, {report.precision}"
    axes.set(title=title, xlabel="layer", ylabel="signal to noise of the product, dB")
    axes.legend(fontsize="small")
    with atomic_file(directory / f"{report.precision}.png") as partial:
        figure.savefig(partial, dpi=120, format="png")
