"""``diagd profile``: latency of a bundle by decoding order and stage, and what changed since."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from diagd.bundle.targets import file_target, folder_target
from diagd.cli import terminal
from diagd.cli.lags import parse_lags
from diagd.cli.paths import path
from diagd.cli.settings import add_set_option, parse_settings
from diagd.errors import DependencyError, UsageError
from diagd.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from diagd.profiling.compare import Comparison
    from diagd.profiling.profile import ProfileOptions
    from diagd.profiling.report import Report, Run

EPILOG = """examples:
  diagd-profile crafter-3m.diagd
  diagd-profile crafter-3m.diagd --k 1,2,4 --fps 10 --output profile --trace trace.json
  diagd-profile --compare before/report.json after/report.json

Writes report.json and report.html, which opens anywhere. Next-token prediction, serial and chained frames are
measured with the window full, behind a first run that is told apart, the quickest first. No order begins once
--budget is spent; what was left out is said. A comparison ends with code 3 where steps became slower beyond
noise.
"""

REGRESSION = 3
BUDGET = 180.0


class ProfileSettings(BaseModel):
    """Options behind ``--set``."""

    model_config = ConfigDict(extra="forbid")
    backend: str = Field("cpu", description="cpu, or on a GPU cuda, tensorrt or tensorrt_rtx")
    engine: str | None = Field(None, description="form of the step graph on the CPU (default: the fastest)")
    precision: str | None = Field(None, description="of the step graph (default: the bundle's first)")
    window: int | None = Field(None, description="frames that a token may see (default: the model's context)")
    prompt: int | None = Field(None, ge=1, description="frames known ahead (default: a full window)")
    threads: int = Field(0, ge=0, description="CPU threads, 0 for one a core")
    pixels: bool = Field(True, description="decode and encode pictures, where there is a tokenizer")
    prepack: bool = Field(True, description="cache packed weights on this machine")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=path, nargs="?", help="what to measure")
    parser.add_argument("--k", default="1,2", help="row lags, each serial and chained (default %(default)s)")
    parser.add_argument("--frames", type=int, default=4, help="of each order (default %(default)s)")
    parser.add_argument("--fps", type=float, help="count frames that come later than this rate allows")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        help="seconds to begin orders in, 0: all (default %(default)g)",
    )
    parser.add_argument("--output", type=path, help="directory for the report (default: NAME.profile)")
    parser.add_argument("--trace", type=path, help="write a Chrome trace; steps become NVTX ranges as well")
    parser.add_argument("--compare", type=path, nargs=2, metavar=("BEFORE", "AFTER"), help="two report.json")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_set_option(parser, ProfileSettings)


def run(args: argparse.Namespace) -> int:
    """Measure and write, or compare; exit code 3 for a regression."""
    if args.compare:
        return _compare(args)
    if args.bundle is None:
        raise UsageError("name a bundle to measure, or two reports with --compare BEFORE AFTER")
    from diagd.bundle import Bundle
    from diagd.profiling.profile import profile

    options = _options(args)
    output = args.output or Path(f"{args.bundle.resolve().name.removesuffix('.diagd')}.profile")
    folder_target(output, {"report.json": b'"schema_version"'}, "a report of diagd-profile")
    if args.trace:
        _check_trace(args.trace, output)
    console = terminal.console(stderr=args.json)
    measured = profile(Bundle.open(args.bundle), options, Progress(console))
    measured.report.write(output / "report.json")
    page = _write_page(output / "report.html", measured.report)
    if args.trace:
        measured.write_trace(args.trace)
    if args.json:
        print(measured.report.model_dump_json(indent=1))  # noqa: T201
    else:
        _print(console, measured.report)
        console.print(page)
    return 0


def _write_page(path: Path, report: Report) -> str:
    """Write the page; returns its path, or what it takes to have one: the report is there all the same."""
    from diagd.profiling.page import write_page

    try:
        write_page(path, report)
    except DependencyError as error:
        return str(error)
    return str(path)


def _check_trace(trace: Path, output: Path) -> None:
    """Find out before the measurement, not behind it.

    Raises:
        UsageError: the trace cannot be written there.
    """
    if trace.absolute().parent == output.absolute():
        output.mkdir(parents=True, exist_ok=True)
    file_target(trace, (), "--trace", begins=b'{"traceEvents"')


def _options(args: argparse.Namespace) -> ProfileOptions:
    from diagd.engines.onnxruntime_session import CpuOptions
    from diagd.profiling.profile import ProfileOptions

    settings = parse_settings(ProfileSettings, args.settings)
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise UsageError(f"--fps {args.fps}: expected a rate above 0")
    if not args.budget >= 0:
        raise UsageError(f"--budget {args.budget}: expected seconds, or 0 for no limit")
    return ProfileOptions(
        ks=parse_lags(args.k),
        backend=settings.backend,
        engine=settings.engine,
        precision=settings.precision,
        frames=args.frames,
        prompt=settings.prompt,
        window=settings.window,
        fps=args.fps,
        pixels=settings.pixels,
        budget=args.budget or None,
        marks=args.trace is not None,
        cpu=CpuOptions(settings.threads, settings.prepack),
    )


def _compare(args: argparse.Namespace) -> int:

    from diagd.profiling.compare import compare
    from diagd.profiling.report import read_report

    comparison = compare(*(read_report(path) for path in args.compare))
    if args.json:
        print(json.dumps(asdict(comparison), indent=2))  # noqa: T201
    else:
        _print_comparison(terminal.console(), comparison)
    return REGRESSION if comparison.regressions else 0


def _print(console: Console, report: Report) -> None:
    from rich.table import Table

    model, machine = report.model, report.machine
    where = machine.device or f"{machine.threads} threads"
    title = f"{model.name} {model.precision}, window {model.window}, {where}"
    head = ("order", "passes", "frames/s", "frame ms", "p99", "action to picture ms", "limit")
    table = Table(*head, title=title)
    table.columns[0].no_wrap = table.columns[5].no_wrap = True
    for run in report.runs:
        steps = sum(width.steps for width in run.widths)
        share = sum(width.share * width.steps for width in run.widths) / max(1, steps)
        frame = (run.intervals.p50, run.intervals.p99)
        table.add_row(
            run.order,
            str(run.passes),
            f"{run.frames_per_second:.4g}",
            *(f"{1e3 * seconds:.4g}" for seconds in frame),
            f"{1e3 * run.action_latency.p50:.4g} .. {1e3 * run.action_latency_worst.p50:.4g}",
            f"{share:.0%}",
        )
    console.print(table)
    for skipped in report.skipped:
        console.print(f"{skipped.order} was skipped: {skipped.reason}")
    _print_stages(console, max(report.runs, key=lambda run: run.frames_per_second))
    if report.runs[0].deadlines:
        late = ", ".join(
            f"{r.order} {r.deadlines.missed} of {r.deadlines.frames}" for r in report.runs if r.deadlines
        )
        console.print(f"deadlines missed at {report.runs[0].deadlines.fps:g} frames/s: {late}")
    slow = sum(len(run.slow_steps) for run in report.runs)
    console.print(
        f"limits measured here: {machine.limits}; peak memory {report.peak_memory / 1e9:.2f} GB; "
        f"{slow} slow steps",
    )


def _print_stages(console: Console, run: Run) -> None:
    from rich.table import Table

    table = Table("stage", "count", "p50 ms", "p90", "p99", "max", "of the run", title=f"stages, {run.order}")
    for stage in sorted(run.stages, key=lambda stage: -stage.seconds.total):
        numbers = stage.seconds
        times = (numbers.p50, numbers.p90, numbers.p99, numbers.max)
        shown = [f"{1e3 * seconds:.3g}" for seconds in times]
        table.add_row(stage.name, str(numbers.count), *shown, f"{numbers.total / run.wall:.1%}")
    console.print(table)


def _print_comparison(console: Console, comparison: Comparison) -> None:
    from rich.table import Table

    colours = {"slower": "red", "faster": "green"}
    table = Table("order", "steps", "before ms", "after ms", "ratio", "99 % interval", "")
    shown = [change for change in comparison.changes if change.verdict != "too few"]
    for change in shown:
        colour = colours.get(change.verdict)
        table.add_row(
            change.order,
            change.width,
            f"{1e3 * change.before:.4g}",
            f"{1e3 * change.after:.4g}",
            f"{change.ratio:.3f}",
            f"{change.low:.3f} .. {change.high:.3f}",
            terminal.styled(change.verdict, colour) if colour else change.verdict,
        )
    console.print(table)
    if few := len(comparison.changes) - len(shown):
        console.print(f"{few} more have too few steps to say")
    for note in comparison.notes:
        console.print(f"note: {note}")
