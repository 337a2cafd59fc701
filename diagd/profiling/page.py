"""A report as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final

import numpy as np

from diagd.bundle.files import atomic_file
from diagd.profiling.report import Report, Run, Stage
from diagd.profiling.svg import COLOURS, Axis, Plot

STYLE: Final = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5d6878;--line:#d8dde5;--card:#f5f7fa;--page:#fff;
--shade:#0003}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa6b6;--line:#343c49;--card:#1b2029;--page:#12151b;
--shade:#fff3}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.45 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:16px}
h1{font-size:1.5rem;margin:.2em 0}h2{font-size:1.15rem;margin:1.6em 0 .4em}
p{margin:.4em 0}.soft{color:var(--soft);font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:14px 0}
.card{background:var(--card);border-radius:8px;padding:10px 12px}.card b{display:block;font-size:1.2rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
figure{margin:0;background:var(--card);border-radius:8px;padding:10px}
figcaption{font-weight:600;margin-bottom:4px}
svg{width:100%;height:auto;display:block}
svg text{font-size:14px;fill:var(--soft)}svg .title{fill:var(--ink)}svg .mark{fill:var(--ink);font-size:13px}
.grid{stroke:var(--line);stroke-width:1}
.legend{font-size:.82rem;color:var(--soft)}.legend span{margin-right:12px;white-space:nowrap}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:4px}
.wide{overflow-x:auto;margin-bottom:14px;background-repeat:no-repeat;
background-image:linear-gradient(90deg,var(--page) 30%,transparent),
linear-gradient(270deg,var(--page) 30%,transparent),
linear-gradient(90deg,var(--shade),transparent),linear-gradient(270deg,var(--shade),transparent);
background-position:left,right,left,right;
background-size:40px 100%,40px 100%,14px 100%,14px 100%;background-attachment:local,local,scroll,scroll}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:right;padding:5px 8px;border-bottom:1px solid var(--line);white-space:nowrap}
th{white-space:normal;vertical-align:bottom;line-height:1.2}
th:first-child,td:first-child{text-align:left}
details{border-bottom:1px solid var(--line)}details[open]{border:0}
summary{padding:8px 0;cursor:pointer}summary b{margin-right:8px}
"""


def write_page(path: Path, report: Report) -> None:
    """Write the page."""
    with atomic_file(path) as partial:
        partial.write_text(page(report))


def page(report: Report) -> str:
    """The whole page."""
    subject, machine = report.subject, report.machine
    title = f"{subject.model} {subject.precision}"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}: latency</title><style>{STYLE}</style>"
    )
    threads = f"{machine.processor}, {machine.threads} thread{'s' * (machine.threads > 1)}"
    created = f"{report.created[:16].replace('T', ' ')} UTC"
    where = ", ".join(filter(None, (machine.device, threads, machine.platform, created)))
    body = [
        f"<h1>{escape(title)}</h1><p class='soft'>{escape(where)}</p>",
        _cards(report),
        "<h2>Decoding orders</h2>",
        _runs(report),
        *(f"<p class='soft'>cut to end in time: {escape(cut)}</p>" for cut in report.cuts),
        *(f"<p class='soft'>{escape(f'{s.order}: {s.reason}')}</p>" for s in report.skipped),
        f"<div class='plots'>{''.join(plot.svg() for plot in plots(report))}</div>",
        "<h2>Stages</h2>",
        _start(report),
        *(_stages(run, run is _best(report)) for run in report.runs),
        "<h2>Steps against the limits of this machine</h2>",
        _widths(report),
        _slow(report),
    ]
    return (
        f"<!doctype html><html lang='en'><head>{head}</head><body><main>{''.join(body)}</main></body></html>"
    )


def plots(report: Report) -> list[Plot]:
    """Frames a second, latency distribution, step times, and the roofline."""
    return [_rates(report.runs), _distribution(report.runs), _timeline(report.runs), _roofline(report)]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _best(report: Report) -> Run:
    return max(report.runs, key=lambda run: run.frames_per_second)


def _cards(report: Report) -> str:
    best, slowest = _best(report), report.runs[0]
    cards = {
        "frames a second": f"{best.frames_per_second:.3g}",
        "decoding order": best.order,
        "times next token": f"{best.frames_per_second / slowest.frames_per_second:.3g}",
        "first frame": _time(best.time_to_first_frame),
        "action to picture": _time(best.action_latency.p50),
        "peak memory": f"{report.peak_memory / 1e9:.2f} GB",
    }
    if report.device_memory:
        cards["device memory"] = f"{report.device_memory / 1e9:.2f} GB"
    shown = "".join(f"<div class='card'>{name}<b>{escape(value)}</b></div>" for name, value in cards.items())
    return f"<div class='cards'>{shown}</div>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways by itself."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='wide'><table><tr>{top}</tr>{lines}</table></div>"


def _runs(report: Report) -> str:
    """The numbers that are asked for most come first: a phone shows the first columns."""
    late = next((run.deadlines for run in report.runs if run.deadlines), None)
    head = (
        *("order", "frames/s", "action to picture", *([f"later than {late.fps:g}/s"] if late else [])),
        *("action just missed", "frame p50", "p90", "p99", "jitter", "first frame", "cold frame", "passes"),
    )
    rows = []
    for run in report.runs:
        frame, deadlines = run.intervals, run.deadlines
        missed = f"{deadlines.missed} of {deadlines.frames}" if deadlines else "-"
        rows.append(
            [
                run.order,
                f"{run.frames_per_second:.3g}",
                _time(run.action_latency.p50),
                *([missed] if late else []),
                _time(run.action_latency_worst.p50),
                *(_time(value) for value in (frame.p50, frame.p90, frame.p99, frame.jitter)),
                _time(run.time_to_first_frame),
                "-" if run.first_run is None else _time(run.first_run),
                str(run.passes),
            ]
        )
    return _table(head, rows)


def _start(report: Report) -> str:
    """What happened once, before any run."""
    rows = [
        [s.name, str(s.seconds.count), _time(s.seconds.total), _time(s.seconds.p50)] for s in report.start
    ]
    table = _table(("stage", "count", "total", "p50"), rows)
    return f"<details><summary><b>start</b>{_shares(report.start)}</summary>{table}</details>"


def _stages(run: Run, shown: bool) -> str:
    rows = []
    for stage in sorted(run.stages, key=lambda stage: -stage.seconds.total):
        numbers = stage.seconds
        parts = (numbers.p50, numbers.p90, numbers.p99, numbers.max)
        share = f"{100 * numbers.total / run.wall:.1f} %"
        rows.append(
            [stage.name, share, _time(numbers.total), str(numbers.count), *(_time(part) for part in parts)]
        )
    head = ("stage", "of the run", "total", "count", "p50", "p90", "p99", "max")
    title = f"<summary><b>{escape(run.order)}</b>{_shares(run.stages)}</summary>"
    return f"<details{' open' if shown else ''}>{title}{_table(head, rows)}</details>"


def _shares(stages: Sequence[Stage]) -> str:
    """The longest stages in a few words, for those who do not open the table."""
    total = sum(stage.seconds.total for stage in stages) or 1.0
    longest = sorted(stages, key=lambda stage: -stage.seconds.total)[:3]
    parts = [f"{stage.name} {100 * stage.seconds.total / total:.0f} %" for stage in longest]
    return f"<span class='soft'>{escape(', '.join([_time(total), *parts]))}</span>"


def _widths(report: Report) -> str:
    note = f"{report.machine.limits}, measured in the same run"
    rows = [
        [
            f"{run.order}, {width.name}",
            _time(width.seconds.p50),
            f"{100 * width.share:.0f} %",
            width.bound,
            f"{width.bandwidth / 1e9:.1f}",
            f"{width.rows:.1f}",
            f"{width.bytes / 1e6:.4g} MB",
            f"{width.operations / 1e6:,.4g} M",
        ]
        for run in report.runs
        for width in run.widths
    ]
    head = ("steps", "time", "of the limit", "bound by", "GB/s", "rows", "bytes", "operations")
    return f"<p class='soft'>{escape(note)}</p>{_table(head, rows)}"


def _slow(report: Report) -> str:
    rows = [
        [run.order, str(step.step), str(step.rows), _time(step.seconds), _time(step.usual)]
        for run in report.runs
        for step in run.slow_steps
    ]
    if not rows:
        return "<h2>Slow steps</h2><p>None took more than three times what its width takes.</p>"
    return f"<h2>Slow steps</h2>{_table(('order', 'step', 'rows', 'took', 'usual'), rows)}"


def _rates(runs: Sequence[Run]) -> Plot:
    high = max(run.frames_per_second for run in runs)
    names = {index + 1.0: run.order for index, run in enumerate(runs)}
    plot = Plot(
        "Frames a second by decoding order",
        Axis("decoding order", 0.4, len(runs) + 0.6, marked=False),
        Axis("frames a second", 0.0, 1.15 * high),
    )
    for index, run in enumerate(runs):
        plot.bar(index + 1, 0.7, run.frames_per_second, _colour(index))
        plot.text(index + 1, run.frames_per_second, f"{run.frames_per_second:.3g}", "middle")
        plot.line([], _colour(index), names[index + 1.0])
    return plot


def _distribution(runs: Sequence[Run]) -> Plot:
    """Share of steps that took at most so long."""
    times = [_milliseconds(run) for run in runs]
    low, high = min(min(t) for t in times), max(max(t) for t in times)
    plot = Plot("Step times: share at or below", Axis("ms", 0.9 * low, 1.1 * high, True), Axis("share", 0, 1))
    for index, (run, values) in enumerate(zip(runs, times, strict=True)):
        ordered = sorted(values)
        picked = np.unique(np.linspace(0, len(ordered) - 1, 200).astype(int))
        points = [(ordered[at], (at + 1) / len(ordered)) for at in picked]
        plot.line(points, _colour(index), run.order)
    return plot


def _timeline(runs: Sequence[Run]) -> Plot:
    times = [_milliseconds(run) for run in runs]
    low, high = min(min(t) for t in times), max(max(t) for t in times)
    longest = max(len(t) for t in times)
    plot = Plot("Every step", Axis("step", 0, longest), Axis("ms", 0.8 * low, 1.2 * high, True))
    for index, (run, values) in enumerate(zip(runs, times, strict=True)):
        stride = max(1, len(values) // 600)
        plot.dots(list(enumerate(values))[::stride], _colour(index), run.order)
    return plot


def _roofline(report: Report) -> Plot:
    """Operations a second over operations a byte, under the two limits."""
    machine, bandwidth = report.machine, max(report.machine.copied, report.machine.read)
    points = [
        (run_index, width.operations / width.bytes, width.operations / width.seconds.p50 / 1e9)
        for run_index, run in enumerate(report.runs)
        for width in run.widths
    ]
    ridge, peak = machine.peak / bandwidth, machine.peak / 1e9
    left = 0.5 * min([x for _, x, _ in points] + [ridge / 4])
    right = 2 * max([x for _, x, _ in points] + [4 * ridge])
    floor = 0.5 * min([y for _, _, y in points] + [peak / 4])
    plot = Plot(
        "Roofline: every width of every order",
        Axis("operations a byte", left, right, True),
        Axis("GFLOP/s", floor, 2 * peak, True),
    )
    limit = [(left, left * bandwidth / 1e9), (ridge, peak), (right, peak)]
    plot.line(limit, "#888888", "measured limit", dashed=True)
    for index, run in enumerate(report.runs):
        plot.dots([(x, y) for i, x, y in points if i == index], _colour(index), run.order, radius=4)
    return plot


def _milliseconds(run: Run) -> list[float]:
    return [1e3 * (sample.engine + sample.sampling + sample.host) for sample in run.samples]


def _time(seconds: float) -> str:
    """Seconds in a unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs"
