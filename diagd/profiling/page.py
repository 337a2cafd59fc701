"""A report as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from diagd.errors import require
from diagd.profiling.report import Report, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Final = ("#3b82c4", "#e0892b", "#3f9d63", "#c2506b", "#7d6bc7", "#8a7a4d", "#2f9aa0")
INK: Final = "#5d6877"
"""Of text and lines in figures; the page replaces it by its own, which follows light and dark."""

POINTS: Final = 600
"""Drawn of a run at most."""


def page(report: Report) -> str:
    """The whole page; DependencyError: jinja2 or matplotlib is not installed."""
    jinja2 = require("jinja2", extra="report", purpose="write report.html")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"time": _time, "digits": "{:.3g}".format}
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    model, machine = report.model, report.machine
    threads = f"{machine.processor}, {machine.threads} thread{'s' * (machine.threads > 1)}"
    created = f"{report.created[:16].replace('T', ' ')} UTC"
    html: str = template.render(
        report=report,
        title=f"{model.name} {model.precision}",
        where=", ".join(filter(None, (machine.device, threads, machine.platform, created))),
        best=max(report.runs, key=lambda run: run.frames_per_second),
        figures=figures(report),
    )
    return html


def figures(report: Report) -> list[str]:
    """Frames a second, latency distribution, step times, and the roofline, each an <svg> element."""
    matplotlib = require("matplotlib", extra="report", purpose="write report.html")
    make_figure = require("matplotlib.figure", extra="report", purpose="write report.html").Figure
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[str, object] = dict.fromkeys(inked, INK) | {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 11,
    }
    style |= {"axes.prop_cycle": matplotlib.cycler(color=COLOURS), "legend.frameon": False}
    found = []
    for draw in (_rates, _distribution, _step_times, _roofline):
        with matplotlib.rc_context(style):
            figure = make_figure(figsize=(5, 3.6), layout="constrained")
            axes = figure.subplots()
            axes.patch.set_alpha(0)
            axes.spines[["top", "right"]].set_visible(False)
            draw(axes, report)
            figure.legend(loc="outside lower center", ncols=3, fontsize="small")
            drawn = io.StringIO()
            figure.savefig(drawn, format="svg", transparent=True)
        found.append(_inline(drawn.getvalue()))
    return found


def _inline(svg: str) -> str:
    """An SVG file as an element of a page, in the page's colours."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>|\sxmlns(:\w+)?=\"[^\"]*\"", "", element, flags=re.DOTALL)
    return element.replace(INK, "currentColor").replace("xlink:href", "href")


def _rates(axes: Axes, report: Report) -> None:
    axes.set(title="Frames a second by decoding order", xticks=[], ylabel="frames a second")
    axes.margins(y=0.1)
    for index, run in enumerate(report.runs):
        bars = axes.bar(index, run.frames_per_second, label=run.order)
        axes.bar_label(bars, [f"{run.frames_per_second:.3g}"])


def _distribution(axes: Axes, report: Report) -> None:
    axes.set(title="Step times: share at or below", xscale="log", xlabel="ms", ylabel="share")
    for run in report.runs:
        axes.ecdf(_milliseconds(run), label=run.order)


def _step_times(axes: Axes, report: Report) -> None:
    axes.set(title="Every step", yscale="log", xlabel="step", ylabel="ms")
    for run in report.runs:
        times = _milliseconds(run)
        steps = np.arange(len(times))[:: max(1, len(times) // POINTS)]
        axes.plot(steps, times[steps], ".", markersize=4, label=run.order)


def _roofline(axes: Axes, report: Report) -> None:
    """Operations a second over operations a byte, under the two limits."""
    machine = report.machine
    bandwidth = max(machine.copied, machine.read)
    axes.set(title="Roofline: every width of every order", xlabel="operations a byte", ylabel="GFLOP/s")
    ridge, peak = machine.peak / bandwidth, machine.peak / 1e9
    reached = [ridge]
    for run in report.runs:
        intensity = [width.operations / width.bytes for width in run.widths]
        speed = [width.operations / width.seconds.p50 / 1e9 for width in run.widths]
        axes.loglog(intensity, speed, "o", markersize=5, label=run.order)
        reached += intensity
    ends = np.array([min(reached) / 2, ridge, 2 * max(reached)])
    axes.loglog(ends, np.minimum(ends * bandwidth / 1e9, peak), "--", color="#888888", label="measured limit")


def _milliseconds(run: Run) -> NDArray[np.float64]:
    return 1e3 * np.array([sample.seconds for sample in run.samples])


def _time(seconds: float) -> str:
    """Seconds in a unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs"
