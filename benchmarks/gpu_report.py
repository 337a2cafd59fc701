"""Results of benchmarks/gpu.py: kept as JSON, shown as Markdown with a verdict on every target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from benchmarks import markdown_table
from diagd.bundle.files import atomic_file
from diagd.errors import UsageError
from diagd.options import Frozen
from diagd.profiling.cost import step_seconds

NEXT_TOKEN, JACOBI = "NTP", "jacobi"
BEGIN, END = "<!-- gpu: begin, written by benchmarks/gpu.py -->", "<!-- gpu: end -->"


class Row(Frozen):
    """One schedule of one model under one runtime, its fastest run.

    ``host``: seconds of Python outside the engine; None for PyTorch. ``bytes_read``, ``operations``: what a
    step needs at least. ``bandwidth``, ``peak``: of the device, measured in the same process.
    """

    model: str
    runtime: str
    schedule: str
    frames: int
    steps: int
    seconds: float
    host: float | None = None
    bytes_read: float
    operations: float
    bandwidth: float
    peak: float

    @property
    def step(self) -> float:
        """Seconds."""
        return self.seconds / self.steps

    @property
    def rate(self) -> float:
        return self.frames / self.seconds

    @property
    def times_floor(self) -> float:
        """Its step over the least that the device allows."""
        return self.step / step_seconds(self.bytes_read, self.operations, self.bandwidth, self.peak)

    def gain(self, other: Row) -> float:
        """How much faster it makes frames than another, over how many fewer steps they take."""
        return self.rate / other.rate / (other.steps / other.frames) * (self.steps / self.frames)


class Check(Frozen):
    """Whether something was right, ahead of what was timed, and what was seen of it."""

    model: str
    name: str
    passed: bool
    figures: dict[str, float]


class Results(BaseModel):
    """Everything measured on one device."""

    model_config = ConfigDict(extra="forbid")
    device: str
    checks: list[Check] = []
    rows: list[Row] = []

    @classmethod
    def read(cls, file: Path, device: str) -> Results:
        """What earlier calls measured on the device.

        Raises:
            UsageError: the file is of another device.
        """
        if not file.is_file():
            return cls(device=device)
        results = cls.model_validate_json(file.read_bytes())
        if results.device != device:
            raise UsageError(
                f"{file} has results of {results.device}, this is {device}; name another file with --results"
            )
        return results

    def write(self, file: Path) -> None:
        with atomic_file(file) as partial:
            partial.write_text(self.model_dump_json(indent=1) + "\n")

    def has(self, model: str, stage: str) -> bool:
        checked = any((check.model, check.name) == (model, stage) for check in self.checks)
        return checked or bool(self.of(model, stage))

    def of(self, model: str, runtime: str) -> list[Row]:
        return [row for row in self.rows if (row.model, row.runtime) == (model, runtime)]


@dataclass(frozen=True)
class Verdict:
    """One target: the worst of what was measured for it, and whether it is met; None: not measured."""

    model: str
    target: str
    measured: str
    met: bool | None

    @property
    def word(self) -> str:
        return "not measured" if self.met is None else "met" if self.met else "missed"


def verdicts(results: Results) -> list[Verdict]:
    """Every target of every model, judged by its worst schedule, each run in the faster way."""
    found = []
    for model, limit in (("cosmos-4b", 1.5), ("mineworld-300m", 2.0)):
        floors = {row.schedule: row.times_floor for row in fastest(results, model, "diagd")}
        target = f"step within {limit} x max(bytes / bandwidth, operations / peak)"
        found.append(_judge(model, target, floors, limit, at_most=True))
    for model in dict.fromkeys(["cosmos-4b", "mineworld-300m", *(row.model for row in results.rows)]):
        ours = {row.schedule: row for row in fastest(results, model, "diagd")}
        of_float = fastest(results, model.partition(":")[0], "published")  # which there is in float16 alone
        times = {row.schedule: ours[row.schedule].rate / row.rate for row in of_float if row.schedule in ours}
        token = ours.pop(NEXT_TOKEN, None)
        gains = {} if token is None else {name: row.gain(token) for name, row in ours.items()}
        found.append(_judge(model, "wall-clock gain at least 0.85 of the step ratio", gains, 0.85))
        target = "at least 5 x the published form's frames/s (its faster way to run)"
        found.append(_judge(model, target, times, 5.0))
    return found


def fastest(results: Results, model: str, runtime: str) -> list[Row]:
    """For each schedule of a model, the fastest row of the runtimes whose names begin so."""
    best: dict[str, Row] = {}
    for row in results.rows:
        if row.model == model and row.runtime.startswith(runtime):
            best[row.schedule] = max(best.get(row.schedule, row), row, key=lambda r: r.rate)
    return list(best.values())


def _judge(
    model: str, target: str, figures: dict[str, float], limit: float, *, at_most: bool = False
) -> Verdict:
    if not figures:
        return Verdict(model, target, "", None)
    worst = (max if at_most else min)(figures, key=lambda schedule: figures[schedule])
    met = figures[worst] <= limit if at_most else figures[worst] >= limit
    return Verdict(model, target, f"{figures[worst]:.2f} ({worst})", met)


def markdown(results: Results) -> str:
    checks = "\n".join(_check_table(results))
    if not results.rows:
        return checks or "**Not measured.**"
    bandwidth, peak = (max(getattr(row, name) for row in results.rows) for name in ("bandwidth", "peak"))
    parts = [
        f"{results.device}. Ceilings: copy {bandwidth / 1e9:,.0f} GB/s, float16 product "
        f"{peak / 1e12:,.0f} TFLOP/s. Random weights, float16, greedy; the fastest of up to three warm runs. "
        "`of ceiling`: the least time that bytes and operations of a step allow, over the time it takes. "
        "`host`: Python outside the engine, which runs ahead of the device. `gain`: that over NTP under the "
        "same runtime, divided by the ratio of steps."
    ]
    for model in dict.fromkeys(row.model for row in results.rows):
        parts.append(f"**{model}**\n\n" + "\n".join(_table(results, model)))
    parts += [checks] if checks else []
    parts.append("\n".join(_verdict_table(results)))
    return "\n\n".join(parts)


def _check_table(results: Results) -> list[str]:
    rows = (
        (
            check.model,
            check.name,
            "passed" if check.passed else "**failed**",
            ", ".join(f"{name} {value:.4g}" for name, value in check.figures.items()),
        )
        for check in results.checks
    )
    return markdown_table(("model", "check", "", "seen"), rows) if results.checks else []


def _table(results: Results, model: str) -> list[str]:
    heads = "runtime", "schedule", "steps/frame", "ms/step", "GB/s", "of ceiling", "frames/s", "host", "gain"
    rows = []
    for row in (row for row in results.rows if row.model == model):
        token = next((r for r in results.of(model, row.runtime) if r.schedule == NEXT_TOKEN), None)
        steps, rate = f"{row.steps / row.frames:.0f}", f"{row.bytes_read / row.step / 1e9:,.0f}"
        host = "" if row.host is None else f"{row.host / row.seconds:.0%}"
        gain = "" if token is None else f"{row.gain(token):.2f}"
        share = f"{1 / row.times_floor:.0%}"
        cells = steps, f"{1e3 * row.step:.3f}", rate, share, f"{row.rate:.2f}", host, gain
        rows.append((row.runtime, row.schedule, *cells))
    return markdown_table(heads, rows)


def _verdict_table(results: Results) -> list[str]:
    rows = ((f"`{one.model}`", one.target, one.measured, one.word) for one in verdicts(results))
    return markdown_table(("model", "target", "worst measured", "verdict"), rows)


def write_section(file: Path, text: str) -> None:
    """Put a text between the two markers of a file; nothing else in it changes.

    Raises:
        UsageError: the markers are not there, once each and in order.
    """
    before, after = around_section(file)
    with atomic_file(file) as partial:
        partial.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def around_section(file: Path) -> tuple[str, str]:
    """What stands before the first marker and behind the second.

    Raises:
        UsageError: they are not there, once each and in order.
    """
    content = file.read_text() if file.is_file() else ""
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise UsageError(f"{file} has no place for the tables: it needs the lines '{BEGIN}' and '{END}'")
    return content.split(BEGIN)[0], content.split(END)[1]
