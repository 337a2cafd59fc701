"""``diagd profile``: latency of a bundle by decoding order and stage, and what changed since."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from diagd.bundle import Bundle
from diagd.bundle.files import atomic_directory, write_text
from diagd.bundle.targets import check_distinct, file_target, folder_target
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.errors import DependencyError, UsageError
from diagd.options import File, Flag, checked, flag, positional
from diagd.profiling.page import page
from diagd.profiling.profile import ProfileOptions, measure_backends, profile
from diagd.profiling.report import Report, Run, compare, read_report
from diagd.progress import Progress

EXAMPLES = """examples:
  diagd-profile crafter-3m.diagd
  diagd-profile crafter-3m.diagd --k 1,2,4 --set fps=10 --output profile --trace trace.json
  diagd-profile crafter-3m.diagd --backends
  diagd-profile --compare before/report.json after/report.json

Writes report.json and report.html, which opens anywhere. Next-token prediction, serial and chained frames are
measured with the window full, behind a first run that is told apart, the quickest first. No order begins once
--budget is spent; what was left out is said. A comparison ends with code 3 where steps became slower beyond
noise.

--backends measures a few frames of the bundle's decoder by every backend and precision, and says which is the
fastest of those that pass the gate of `diagd verify`, and with how many threads. Where nothing is named, this
machine then decodes the bundle with as many threads, and play, serve and generate on that backend in that
precision, saying so; doctor and plan say so too.
"""

REGRESSION = 3
REPORT, PAGE = "report.json", "report.html"
_MARKS = {True: ("ok", "green"), False: ("failed", "red"), None: ("not judged", "yellow")}


@checked
class ProfileVerb:
    """What is measured or compared, and what is written of it."""

    bundle: File | None = positional("what to measure", None)
    measure: ProfileOptions = ProfileOptions()
    output: File | None = flag("directory for the report (default: NAME.profile)", None)
    trace: File | None = flag("write a Chrome trace; steps become NVTX ranges as well", None)
    compare: tuple[File, File] | None = flag(
        "two report.json", None, Flag(count=2, metavar=("BEFORE", "AFTER"))
    )
    backends: bool = flag("find the fastest backend, precision and threads instead", False)
    json: bool = flag("print the report as JSON", False)


def run(options: ProfileVerb) -> int:
    """Measure and write, or compare; exit code 3 for a regression."""
    if options.compare:
        return _compare(*options.compare, as_json=options.json)
    if options.bundle is None:
        raise UsageError("name a bundle to measure, or two reports with --compare BEFORE AFTER")
    if options.backends:
        if options.output or options.trace:
            raise UsageError("--backends writes no report and no trace; leave --output and --trace out")
        return _backends(options, options.bundle)
    output = options.output or Path(f"{options.bundle.resolve().name.removesuffix('.diagd')}.profile")
    folder_target(output, {REPORT: b'"schema_version"'}, "a report of diagd-profile")
    if options.trace:
        _check_trace(options.trace, output)
    console = terminal.console(stderr=options.json)
    how = replace(options.measure, marks=options.trace is not None)
    measured = profile(Bundle.open(options.bundle), how, Progress(console))
    told = str(output / PAGE)
    with atomic_directory(output, (REPORT, PAGE)) as folder:
        measured.report.write(folder / REPORT)
        try:
            write_text(folder / PAGE, page(measured.report))
        except DependencyError as error:  # the report is there all the same
            told = str(error)
    if options.trace:
        measured.write_trace(options.trace)
    if options.json:
        print(measured.report.model_dump_json(indent=1))  # noqa: T201
    else:
        _print(console, measured.report)
        console.print(told)
    return 0


def _backends(options: ProfileVerb, path: Path) -> int:
    console = terminal.console(stderr=options.json)
    found, skipped = measure_backends(Bundle.open(path), options.measure, Progress(console))
    if options.json:
        print(found.model_dump_json(indent=1))  # noqa: T201
    rows = []
    for entry in sorted(found.entries, key=lambda entry: entry.seconds):
        times = f"{1e3 * entry.seconds:.4g}", f"{1 / entry.seconds:.4g}"
        rows.append((str(entry), str(entry.threads), *times, terminal.styled(*_MARKS[entry.passed])))
    heads = ("backend and precision", "threads", "frame ms", "frames/s", "gate")
    terminal.print_table(console, heads, rows, found.order)
    for left in skipped:
        console.print(f"{left.order} was skipped: {left.reason}", highlight=False)
    if best := found.fastest():
        console.print(f"fastest on this machine: {best.settings}", highlight=False)
    return 0


def _check_trace(trace: Path, output: Path) -> None:
    """Find out before the measurement, not behind it; UsageError: the trace cannot be written there."""
    if trace.absolute().parent == output.absolute():
        output.mkdir(parents=True, exist_ok=True)
    file_target(trace, (), "--trace", begins=b'{"traceEvents"')
    check_distinct({"the report": output / REPORT, "its page": output / PAGE, "--trace": trace})


def _compare(before: Path, after: Path, *, as_json: bool) -> int:
    comparison = compare(read_report(before), read_report(after))
    code = REGRESSION if comparison.regressions else 0
    if as_json:
        terminal.print_json(asdict(comparison))
        return code
    console, colours = terminal.console(), {"slower": "red", "faster": "green"}
    rows: list[tuple[str | Text, ...]] = []
    shown = [change for change in comparison.changes if change.verdict != "too few"]
    for change in shown:
        colour = colours.get(change.verdict)
        times = f"{1e3 * change.before:.4g}", f"{1e3 * change.after:.4g}", f"{change.ratio:.3f}"
        verdict = terminal.styled(change.verdict, colour) if colour else change.verdict
        rows.append((change.order, change.width, *times, f"{change.low:.3f} .. {change.high:.3f}", verdict))
    heads = ("order", "steps", "before ms", "after ms", "ratio", "99 % interval", "")
    terminal.print_table(console, heads, rows)
    if few := len(comparison.changes) - len(shown):
        console.print(f"{few} more have too few steps to say")
    for note in comparison.notes:
        console.print(f"note: {note}")
    return code


def _print(console: Console, report: Report) -> None:
    model, machine = report.model, report.machine
    where = machine.device or f"{machine.threads} threads"
    title = f"{model.name} {model.precision}, window {model.window}, {where}"
    head = ("order", "passes", "frames/s", "frame ms", "p99", "action to picture ms", "limit")
    rows = []
    for run in report.runs:
        steps = sum(width.steps for width in run.widths)
        share = sum(width.share * width.steps for width in run.widths) / max(1, steps)
        frame = (run.intervals.p50, run.intervals.p99)
        latency = f"{1e3 * run.action_latency.p50:.4g} .. {1e3 * run.action_latency_worst.p50:.4g}"
        times = (f"{run.frames_per_second:.4g}", *(f"{1e3 * seconds:.4g}" for seconds in frame), latency)
        rows.append((run.order, str(run.passes), *times, f"{share:.0%}"))
    terminal.print_table(console, head, rows, title, whole=(0, 5))
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
        f"{slow} slow steps"
    )


def _print_stages(console: Console, run: Run) -> None:
    rows = []
    for stage in sorted(run.stages, key=lambda stage: -stage.seconds.total):
        numbers = stage.seconds
        times = (numbers.p50, numbers.p90, numbers.p99, numbers.max)
        shown = [f"{1e3 * seconds:.3g}" for seconds in times]
        rows.append((stage.name, str(numbers.count), *shown, f"{numbers.total / run.wall:.1%}"))
    heads = ("stage", "count", "p50 ms", "p90", "p99", "max", "of the run")
    terminal.print_table(console, heads, rows, f"stages, {run.order}")


VERB = Verb(ProfileVerb, run, EXAMPLES)
